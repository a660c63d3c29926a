"""Hosts that the bench puts in force: copies without any overlap, to compare with, and draws of given layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor

from grass.host import Host, HostAround, current, using
from grass.offload.streams import CudaStreams, Streams


class SerialStreams(CudaStreams):
    """All three queues are the stream that the model runs on: every copy stands in the way of the computation."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._own = dict.fromkeys(self._own, torch.cuda.current_stream(device))

    def copy(self, queue: Literal["fetch", "return"], target: Tensor, source: Tensor) -> None:
        """Copy in the order of the computation; all of its time is exposed."""
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record(self._stream("compute"))
        super().copy(queue, target, source)
        after.record(self._stream("compute"))
        self._waits.append((before, after))


class SerialHost(HostAround):
    """Every state offload that is built under it (an optimizer builds it in its first step) copies serially."""

    def streams(self, device: torch.device) -> Streams:
        """Serial ones on CUDA."""
        return SerialStreams(device) if device.type == "cuda" else super().streams(device)

    def allocated_bytes(self, device: torch.device) -> None:
        """Unknown, so that nothing is fetched during backward."""


def serial_copies() -> AbstractContextManager[None]:
    """Put a `SerialHost` in force."""
    return using(SerialHost(current()))


class SetsByTurns(HostAround):
    """Layers are drawn as ever, since a draw costs time too, but these sets train, one after the other."""

    def __init__(self, inner: Host, sets: Iterator[tuple[int, ...]]) -> None:
        super().__init__(inner)
        self._sets = sets

    def draw(self, layers: int, count: int, by_chance: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        """The next set."""
        by_chance()
        return next(self._sets)
