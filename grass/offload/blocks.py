"""Moments of a parameter group as one flat block, split into chunks for transfer and pieces for the update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grass.adamw import pieces_of

CHUNK_BYTES = 16 * 2**20
"""Pieces are copied together up to this size, both moments counted; a single piece may be larger. Every update needs
`grass.offload.offload.RING` such buffers on top of weights and gradients, while a copy of this size, a third of a
millisecond at 50 GB/s, still reaches the bus's full rate."""


@dataclass(frozen=True)
class Piece:
    """Entries `start` to `end` of one parameter; in the block they begin at `offset`."""

    parameter: int
    start: int
    end: int
    offset: int


@dataclass(frozen=True)
class Chunk:
    """Consecutive pieces that are copied together: entries `start` to `end` of the block."""

    start: int
    end: int
    pieces: tuple[Piece, ...]

    @property
    def elements(self) -> int:
        """Entries of one moment."""
        return self.end - self.start


class Block:
    """Both moments of every parameter of one group, shape (2, entries): first moments, then second.

    `home` holds the moments when nothing is staged: a host tensor, or a device buffer while the group trains in
    `resident` mode; None before the group's first update.
    """

    def __init__(self, index: int, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        self.index = index
        self.parameters = list(parameters)
        self.dtype = dtype
        counts = [p.numel() for p in self.parameters]
        self.offsets = [sum(counts[:i]) for i in range(len(counts))]
        self.elements = sum(counts)
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
            for first, last in pieces_of(parameter):
                if pieces and end + (last - first) - start > limit:
                    yield Chunk(start, end, tuple(pieces))
                    pieces, start = [], end
                pieces.append(Piece(number, first, last, offset + first))
                end = offset + last
        if pieces:
            yield Chunk(start, end, tuple(pieces))

    def view(self, parameter: int, of: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """First and second moments of a parameter, in its shape, as views of `home` or of another copy of the block."""
        home = self.home if of is None else of
        assert home is not None
        offset, shape = self.offsets[parameter], self.parameters[parameter].shape
        first, second = (row.narrow(0, offset, shape.numel()).view(shape) for row in home)
        return first, second
