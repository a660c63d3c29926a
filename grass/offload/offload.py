"""Moments of sleeping layers stay on the host; those of active layers are on the device only as long as needed.

`resident`: a group's moments are on the device while it trains, and are swapped when the active layers change. `move`:
all moments stay on the host; `step` stages them in chunks, updates, and sends them back during the next forward pass,
so that none is on the device when activations peak. Events alone decide what is fetched, when, and into which buffer.
Results are bitwise equal in both modes.

Overlapping a copy with the *update* of another layer, as the paper describes, cannot hide it: a layer's update takes a
millisecond, its copy about sixteen. Backward can hide it if memory allows (see `grass.offload.headroom`); the copy back
overlaps with the next forward pass.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from grass.host import current
from grass.offload.blocks import Block, Chunk
from grass.offload.headroom import BackwardHeadroom

Mode = Literal["resident", "move"]

RING = 4
"""Buffers that a step may use beyond those filled in backward: one being fetched, one updated, two written back."""
FREE_TO_STAY = 1.25
"""`auto`: states stay resident if this many times their bytes are free at peak; the surplus is for fragmentation."""
TEMPORARY_BYTES = 25
"""Temporary bytes of the update per entry of the current piece, at most: five fp32 numbers in
`grass.adamw.update_by_operations`, and what `grass.rounding.round_stochastically` needs."""

UpdateChunk = Callable[[Block, Chunk, Tensor], None]
"""Updates the pieces of a chunk with the moments in the given buffer, shape (2, elements of the chunk)."""


@dataclass
class _Staged:
    """A device buffer, the event that fills it, and (once written back) the event that empties it."""

    buffer: Tensor
    ready: Any = None


class StateOffload:
    """Keeps the moments of all groups of one optimizer.

    Args:
        blocks: one a parameter group.
        device: where the parameters are.
        mode: `resident`, `move`, or `auto`. `auto` starts with `move` and decides at the first change of layers, when
            the memory free at peak is known; where device memory is host memory, it is always `resident`.
    """

    def __init__(self, blocks: Sequence[Block], device: torch.device, mode: str) -> None:
        self.blocks = list(blocks)
        self.device = device
        self.streams = current().streams(device)
        self.headroom = BackwardHeadroom(device)
        self.arena = current().arena(pin=device.type == "cuda", settle=self.streams.settle)
        # the last reference may be dropped during a copy, which would free the buffers
        weakref.finalize(self, self.streams.settle)
        self.moved_bytes = 0
        """Bytes copied since this was last set to 0, both directions."""
        self.undecided = False
        self.why = f"offload={mode!r}"
        self.mode: Mode = "resident" if mode == "resident" else "move"
        if mode == "auto":
            self.undecided = self._free_at_peak() is not None
            self.mode = "move" if self.undecided else "resident"
            self.why = "auto: watching the peak" if self.undecided else "auto: device memory is host memory"
        self._has_updated = False
        self._fetched: dict[tuple[int, int], _Staged] = {}
        """Chunks on the device or being fetched, by (block, chunk)."""
        self._returning: deque[tuple[Tensor, Any]] = deque()
        """Buffers being written back, each with the event that marks the end of its copy; oldest first."""
        self._written: dict[tuple[int, int], Any] = {}
        """`move`: event after which the host block holds a chunk's newest moments."""

    # ------------------------------------------------------------ layers change

    @property
    def apart(self) -> bool:
        """Whether device and host memory are separate; if not (CPU), moments are never copied."""
        return self.streams.apart

    def change(self, asleep: Iterable[Block], awake: Iterable[Block], *, keep: bool) -> None:
        """Change the groups that train.

        Args: asleep: groups that do not train now. awake: groups that do. keep: whether sleeping groups keep their
        moments on the host; otherwise these are dropped.
        """
        self.headroom.new_period()
        self.drop_fetched()
        for block in asleep:
            if not keep:
                self.forget(block)
            elif self.mode == "resident" and block.home is not None and block.home is not block.host and self.apart:
                self._send_home(block)
        awake = list(awake)
        if self.undecided:
            self._decide(awake)
        if self.mode == "resident" and self.apart:
            for block in awake:
                if block.home is not None and block.home is block.host:
                    self._bring(block)

    def _decide(self, awake: Sequence[Block]) -> None:
        free = self._free_at_peak()
        needed = sum(block.nbytes for block in awake)
        if free is None or not self._has_updated:
            return  # no step yet, so no peak to judge by
        self.undecided = False
        stays = free >= FREE_TO_STAY * needed
        self.mode = "resident" if stays else "move"
        self.why = (
            f"auto: {free:,} bytes free at peak, {needed:,} bytes of states in use: "
            f"{'they stay' if stays else 'they move'}"
        )

    def _free_at_peak(self) -> int | None:
        """Bytes that this process could have allocated above its peak; None where device memory is host memory."""
        obtainable, peak = current().obtainable_bytes(self.device), current().peak_bytes(self.device)
        return None if obtainable is None or peak is None else obtainable - peak

    def forget(self, block: Block) -> None:
        """Drop a group's moments."""
        self.drop_fetched([block])
        if block.home is not None and block.home is not block.host:
            self._returning.append((block.home, block.ready or self.streams.mark("compute")))
        if block.host is not None:
            self.arena.release(block.host)
        block.home = block.host = block.ready = None
        self._written = {key: event for key, event in self._written.items() if key[0] != block.index}

    def _send_home(self, block: Block) -> None:
        """`resident`: from the device buffer to the host block."""
        buffer, streams = block.home, self.streams
        assert buffer is not None
        if block.ready is not None:
            streams.wait("return", block.ready)
        if block.host is None:
            block.host = self.arena.take(block.elements, block.dtype)
        streams.wait("return", streams.mark("compute"))
        self._copy("return", block.host, buffer)
        event = streams.mark("return")
        block.home, block.ready = block.host, event
        self._returning.append((buffer, event))

    def _bring(self, block: Block) -> None:
        """`resident`: from the host block to a device buffer; reuses the buffer of a group that leaves, if one fits."""
        assert block.host is not None
        streams = self.streams
        buffer = self._take_returning(block.elements, block.dtype, "fetch")
        if buffer is None:
            buffer = streams.allocate(block.elements, block.dtype)
            streams.wait("fetch", streams.mark("compute"))
        if block.ready is not None:
            streams.wait("fetch", block.ready)
        for chunk in range(len(block.chunks)):
            written = self._written.pop((block.index, chunk), None)
            if written is not None:
                streams.wait("fetch", written)
        self._copy("fetch", buffer, block.host)
        block.home, block.ready = buffer, streams.mark("fetch")

    def _take_returning(self, elements: int, dtype: torch.dtype, queue: Literal["compute", "fetch"]) -> Tensor | None:
        """A buffer of exactly that size that is being written back, or None; `queue` waits until its copy is done."""
        for place, (buffer, event) in enumerate(self._returning):
            if buffer.shape[1] == elements and buffer.dtype == dtype:
                del self._returning[place]
                self.streams.wait(queue, event)
                return buffer
        return None

    # ------------------------------------------------------------ backward

    @cached_property
    def _update_bytes(self) -> int:
        """Bytes that a staged update allocates: its ring of buffers and one piece's temporaries."""
        chunks = [(chunk, block.dtype.itemsize) for block in self.blocks for chunk in block.chunks]
        ring = RING * max(2 * chunk.elements * itemsize for chunk, itemsize in chunks)
        piece = max(piece.end - piece.start for chunk, _ in chunks for piece in chunk.pieces)
        return ring + TEMPORARY_BYTES * piece

    def prefetch(self, blocks: Sequence[Block], *, more_to_come: bool, gradients: int) -> None:
        """`move`: fetch moments of groups with final gradients, as long as this does not raise the peak.

        Args:
            blocks: the groups.
            more_to_come: see `BackwardHeadroom.bytes`.
            gradients: see `BackwardHeadroom.bytes`.
        """
        if self.mode != "move":
            return
        for block in blocks:
            if block.home is None:
                continue  # its first update: zeros need no fetching
            for number, chunk in enumerate(block.chunks):
                if (block.index, number) in self._fetched:
                    continue
                nbytes = 2 * chunk.elements * block.dtype.itemsize
                free = self.headroom.bytes(more_to_come=more_to_come, gradients=gradients, update=self._update_bytes)
                if free < nbytes:
                    return
                self.headroom.taken(nbytes)
                self._stage(block, number, self._new_buffer(chunk.elements, block.dtype))

    def drop_fetched(self, blocks: Iterable[Block] | None = None) -> None:
        """Drop chunks (of `blocks`, or all) fetched in backward for a step not taken; the host still holds them."""
        chosen = None if blocks is None else {block.index for block in blocks}
        for key in [key for key in self._fetched if chosen is None or key[0] in chosen]:
            staged = self._fetched.pop(key)
            self._returning.append((staged.buffer, staged.ready))

    def _new_buffer(self, elements: int, dtype: torch.dtype) -> Tensor:
        buffer = self.streams.allocate(elements, dtype)
        # the allocator may return memory that `compute` has freed but still uses
        self.streams.wait("fetch", self.streams.mark("compute"))
        return buffer

    def _stage(self, block: Block, number: int, buffer: Tensor) -> None:
        assert block.host is not None
        chunk = block.chunks[number]
        written = self._written.pop((block.index, number), None)
        if written is not None:
            self.streams.wait("fetch", written)
        self._copy("fetch", buffer[:, : chunk.elements], block.host[:, chunk.start : chunk.end])
        self._fetched[block.index, number] = _Staged(buffer, self.streams.mark("fetch"))

    # ------------------------------------------------------------ step

    def update(self, blocks: Sequence[Block], apply: UpdateChunk) -> None:
        """Update the groups `blocks`: staged in `move` mode, in place in `resident` mode."""
        self._has_updated = True
        for block in blocks:
            self._ensure_home(block)
        if self.mode == "move":
            self._update_staged(blocks, apply)
            return
        for block in blocks:
            home = block.home
            assert home is not None
            if block.ready is not None:
                self.streams.wait("compute", block.ready)
                block.ready = None
            for chunk in block.chunks:
                self._apply(apply, block, chunk, home[:, chunk.start : chunk.end], home)

    def _ensure_home(self, block: Block) -> None:
        """Create zero moments for a group that has none yet."""
        if block.home is not None:
            return
        if self.mode == "move" or not self.apart:
            self.put_home(block, self.arena.take(block.elements, block.dtype))
            return
        found = self._take_returning(block.elements, block.dtype, "compute")
        buffer = self.streams.allocate(block.elements, block.dtype) if found is None else found
        self.streams.compute(lambda: _clear(buffer), buffer)
        block.home = buffer

    def _update_staged(self, blocks: Sequence[Block], apply: UpdateChunk) -> None:
        """Fetch, update and send back chunk by chunk; chunks that backward fetched come first."""
        self.release()
        work = [(block, number) for block in blocks for number in range(len(block.chunks))]
        work.sort(key=lambda item: (item[0].index, item[1]) not in self._fetched)
        largest: dict[torch.dtype, int] = {}
        for block, number in work:
            largest[block.dtype] = max(largest.get(block.dtype, 0), block.chunks[number].elements)
        ring = dict.fromkeys(largest, RING)
        ahead = 0
        for block, number in work:
            while ahead < len(work):
                next_block, next_number = work[ahead]
                if (next_block.index, next_number) not in self._fetched:
                    dtype = next_block.dtype
                    if ring[dtype] > 0:
                        ring[dtype] -= 1
                        buffer = self._new_buffer(largest[dtype], dtype)
                    else:
                        returned = self._take_returning(largest[dtype], dtype, "fetch")
                        if returned is None:
                            break
                        buffer = returned
                    self._stage(next_block, next_number, buffer)
                ahead += 1
            staged, chunk = self._fetched.pop((block.index, number)), block.chunks[number]
            self.streams.wait("compute", staged.ready)
            moments = staged.buffer[:, : chunk.elements]
            self._apply(apply, block, chunk, moments, staged.buffer)
            self.streams.wait("return", self.streams.mark("compute"))
            assert block.host is not None
            self._copy("return", block.host[:, chunk.start : chunk.end], moments)
            event = self._written[block.index, number] = self.streams.mark("return")
            self._returning.append((staged.buffer, event))

    def _apply(self, apply: UpdateChunk, block: Block, chunk: Chunk, moments: Tensor, buffer: Tensor) -> None:
        self.streams.compute(lambda: apply(block, chunk, moments), buffer)

    def _copy(self, queue: Literal["fetch", "return"], target: Tensor, source: Tensor) -> None:
        self.streams.copy(queue, target, source)
        self.moved_bytes += target.nbytes

    # ------------------------------------------------------------ forward, and the end

    @property
    def returning(self) -> int:
        """Buffers that are being written back."""
        return len(self._returning)

    def release(self, keep: int = 0) -> None:
        """Free buffers being written back, oldest first, until `keep` are left; `compute` waits for their copies."""
        while len(self._returning) > keep:
            buffer, event = self._returning.popleft()
            self.streams.wait("compute", event)
            self.streams.free(buffer)

    def release_done(self) -> None:
        """Free buffers whose copy back is already done, without waiting."""
        while self._returning and self.streams.done(self._returning[0][1]):
            self.release(keep=len(self._returning) - 1)

    def put_home(self, block: Block, host: Tensor) -> None:
        """Make a host block from `arena` the home of a group's moments: for its first update, or for a resume."""
        block.home = block.host = host

    def settle(self) -> None:
        """Block until all copies are done; call this before reading or writing moments from the host."""
        self.streams.settle()
        self._written.clear()
        for block in self.blocks:
            block.ready = None


def _clear(buffer: Tensor) -> None:
    buffer.zero_()
