"""The state offload without any overlap, to compare with: fetch, update and return one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from grass.offload import offload
from grass.offload.streams import CudaStreams, NoStreams, Streams


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

    def allocated(self) -> None:
        """Unknown, so that nothing is fetched during backward."""


def _serial_streams_for(device: torch.device) -> Streams:
    return SerialStreams(device) if device.type == "cuda" else NoStreams(device)


@contextmanager
def serial_copies() -> Iterator[None]:
    """Every state offload that is built within (an optimizer builds it in its first step) copies serially."""
    names = vars(offload)
    usual = names["streams_for"]
    names["streams_for"] = _serial_streams_for
    try:
        yield
    finally:
        names["streams_for"] = usual
