"""Moments of a parameter group as one flat block, split into chunks for transfer and pieces for the update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from grass.adamw import pieces_of
from grass.quantised import PACKED, moment_bytes, stored_dtype

CHUNK_BYTES = 16 * 2**20
"""Pieces are copied together up to this size, both moments counted; a single piece may be larger. Every update needs
`grass.offload.offload.RING` such buffers on top of weights and gradients, while a copy of this size, a third of a
millisecond at 50 GB/s, still reaches the bus's full rate."""


@dataclass(frozen=True)
class Piece:
    """Entries `start` to `end` of one parameter; their moments begin at `offset` of the block's rows."""

    parameter: int
    start: int
    end: int
    offset: int
    elements: int
    """How much of a row each of their moments takes."""
    dtype: torch.dtype
    """In which they are stored: the block's, or fp32 in a block of packed moments."""

    def moments(self, rows: Tensor, begin: int) -> tuple[Tensor, Tensor]:
        """First and second moments of the piece, one-dimensional, as views of `rows`, where they begin at `begin`."""
        first, second = (row.narrow(0, begin, self.elements).view(self.dtype) for row in rows)
        return first, second


@dataclass(frozen=True)
class Chunk:
    """Consecutive pieces that are copied together: `start` to `end` of the block's rows."""

    start: int
    end: int
    pieces: tuple[Piece, ...]

    @property
    def elements(self) -> int:
        """Length of its rows."""
        return self.end - self.start

    @cached_property
    def whole(self) -> tuple[Piece, ...]:
        """Its pieces, those of one parameter joined: for an update that has no temporaries."""
        joined = (list(pieces) for _, pieces in groupby(self.pieces, key=lambda piece: piece.parameter))
        return tuple(replace(own[0], end=own[-1].end, elements=sum(piece.elements for piece in own)) for own in joined)


class Block:
    """Both moments of every parameter of one group, in two rows: first moments, then second.

    A row has one element an entry, of the moments' dtype. If they are packed in 8 bits, a row is of bytes, in which the
    small parameters' moments are fp32; every parameter begins at a multiple of 4 bytes.

    `home` holds the moments when nothing is staged: a host tensor, or a device buffer while the group trains in
    `resident` mode; None before the group's first update.
    """

    def __init__(self, index: int, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        self.index = index
        self.parameters = list(parameters)
        self.dtype = dtype
        counts = [self._length(p.numel(), self._stored(i)) for i, p in enumerate(self.parameters)]
        self.offsets = [sum(counts[:i]) for i in range(len(counts))]
        self.elements = sum(counts)
        """Length of a row."""
        self.home: Tensor | None = None
        self.host: Tensor | None = None
        """Host block; kept while the moments are on the device, so that it is pinned only once."""
        self.ready: Any = None
        """Event after which `home` holds the moments, while a copy into it is in flight."""
        self._chunks: list[Chunk] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both moments."""
        return 2 * self.elements * self.dtype.itemsize

    @property
    def chunks(self) -> list[Chunk]:
        """The block, split into chunks of whole pieces by `CHUNK_BYTES`; the split is the same in every mode."""
        if self._chunks is None:
            self._chunks = list(self._cut(CHUNK_BYTES // (2 * self.dtype.itemsize)))
        return self._chunks

    def _cut(self, limit: int) -> Iterator[Chunk]:
        pieces: list[Piece] = []
        start = end = 0
        for number, (parameter, offset) in enumerate(zip(self.parameters, self.offsets, strict=True)):
            dtype = self._stored(number)
            for first, last in pieces_of(parameter, dtype):
                length = self._length(last - first, dtype)
                if pieces and end + length - start > limit:
                    yield Chunk(start, end, tuple(pieces))
                    pieces, start = [], end
                begin = offset + self._length(first, dtype)
                pieces.append(Piece(number, first, last, begin, length, dtype))
                end = begin + length
        if pieces:
            yield Chunk(start, end, tuple(pieces))

    def _stored(self, parameter: int) -> torch.dtype:
        return stored_dtype(self.parameters[parameter].numel(), self.dtype)

    def _length(self, entries: int, dtype: torch.dtype) -> int:
        """How much of a row the first `entries` entries of a parameter take."""
        return moment_bytes(entries, dtype) // self.dtype.itemsize

    def view(self, parameter: int, of: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """First and second moments of a parameter, as views of `home` or of another copy of the block.

        They have the parameter's shape; packed ones are one-dimensional.
        """
        home = self.home if of is None else of
        assert home is not None
        given, dtype = self.parameters[parameter], self._stored(parameter)
        length = self._length(given.numel(), dtype)
        shape = (length,) if dtype == PACKED else given.shape
        first, second = (row.narrow(0, self.offsets[parameter], length).view(dtype).view(shape) for row in home)
        return first, second
