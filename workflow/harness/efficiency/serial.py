"""A host under which every copy of optimizer states stands in the way of computing: what overlap is compared with."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from grass.host import HostAround
from grass.offload.streams import CudaStreams, Streams


class SerialStreams(CudaStreams):
    """All three queues are the stream that the model runs on, so each copy waits for it and it for each copy."""

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
