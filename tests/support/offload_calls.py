"""Random sequences of everything that `StateOffload` allows, against moments in a plain list.

The training loop calls it in a few orders only, in which one event often stands for another; here every event counts.
"""

from __future__ import annotations

import random

import pytest
import torch
from fake_streams import RecordingStreams, install
from torch import Tensor, nn

import grass.offload.states
from grass.offload.blocks import Block, Chunk

DEVICE = torch.device("cpu")
SHAPES = [((7, 9), (40,)), ((103,),), ((11, 11), (5,)), ((103,),), ((64,), (3, 13)), ((103,),)]
"""Of the parameters of six groups. Most have 103 entries, so that they can take over each other's buffers, if they are
of one dtype: every third has moments in bf16."""


class Calls:
    """One offload under test, and what its moments must be.

    Args:
        seed: of the calls, of the order of copies, and of the headroom during backward.
        mode: of the offload.
    """

    def __init__(self, seed: int, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("grass.offload.blocks.CHUNK_BYTES", 256)
        monkeypatch.setattr("grass.host.PIECE_ELEMENTS", {"cpu": 16, "other": 16})
        monkeypatch.setattr("grass.offload.offload.RING", 3)
        self.random = random.Random(seed)
        self.streams = RecordingStreams(seed)
        install(monkeypatch, self.streams)
        self.blocks = [
            Block(
                i,
                [nn.Parameter(torch.empty(shape)) for shape in shapes],
                torch.bfloat16 if i % 3 == 2 else torch.float32,
            )
            for i, shapes in enumerate(SHAPES)
        ]
        self.moments: list[Tensor | None] = [None] * len(SHAPES)
        self.offload = grass.offload.states.StateOffload(self.blocks, DEVICE, mode)
        self.awake = list(self.blocks)

    def run(self, calls: int) -> str | None:
        """So many calls; the first thing that is wrong, None where nothing is."""
        names = ["change", "change", "fetch", "update", "update", "release", "drop", "look"]
        for number in range(calls):
            name = self.random.choice(names)
            problem = getattr(self, name)()
            if self.streams.checker.races:
                problem = self.streams.checker.races[0]
            if problem is not None:
                return f"call {number}, {name}: {problem}"
        self.fetch()
        return self.look() or self.end()

    def change(self) -> None:
        self.awake = self.random.sample(self.blocks, self.random.randint(1, 4))
        asleep = [block for block in self.blocks if block not in self.awake]
        keep = self.random.random() < 0.8
        self.offload.change(asleep, self.awake, keep=keep)
        if not keep:
            for block in asleep:
                self.moments[block.index] = None

    def fetch(self) -> None:
        """A backward pass; its step may come or not."""
        for _ in range(2):
            self.offload.headroom.entering_layer()
            some = self.random.sample(self.awake, self.random.randint(0, len(self.awake)))
            self.offload.prefetch(some, more_to_come=self.random.random() < 0.5, gradients=0)

    def update(self) -> None:
        some = self.random.sample(self.awake, self.random.randint(1, len(self.awake)))
        self.offload.update(sorted(some, key=lambda block: block.index), self.apply)
        self.offload.headroom.step_done()
        for block in some:
            old = self.moments[block.index]
            new = torch.zeros(2, block.elements, dtype=block.dtype) if old is None else old.clone()
            self.apply(block, Chunk(0, block.elements, ()), new)
            self.moments[block.index] = new

    def apply(self, block: Block, chunk: Chunk, moments: Tensor) -> None:
        """Something that tells each entry from every other, and each update from the next."""
        moments[1].add_(1 + moments[0])
        moments[0].mul_(0.5).add_(torch.arange(chunk.start, chunk.end, dtype=moments.dtype))

    def release(self) -> None:
        if self.random.random() < 0.5:
            self.offload.release(keep=self.random.randint(0, 2))
        else:
            self.offload.release_done()

    def drop(self) -> None:
        self.offload.drop_fetched(None if self.random.random() < 0.5 else self.random.sample(self.blocks, 2))

    def look(self) -> str | None:
        """The host reads all moments."""
        self.offload.settle()
        for block, moments in zip(self.blocks, self.moments, strict=True):
            if (block.home is None) is not (moments is None):
                return f"group {block.index} {'has no' if block.home is None else 'still has'} moments"
            if block.home is not None and moments is not None:
                self.streams.host("reads", block.home, writes=False)
                if not torch.equal(block.home, moments):
                    return f"moments of group {block.index} differ"
                if block not in self.awake and block.home.data_ptr() in self.streams.live:
                    return f"group {block.index} sleeps with its moments on the device"
        return None

    def end(self) -> str | None:
        for block in self.blocks:
            self.offload.forget(block)
        self.offload.release()
        if self.streams.checker.races:
            return self.streams.checker.races[0]
        if self.streams.live or self.offload.arena.nbytes:
            return f"{len(self.streams.live)} buffers, {self.offload.arena.nbytes} bytes of host memory left behind"
        return None
