"""Copies between device and host that overlap with computation: three queues, ordered only by events.

The state offload uses only this interface, so the same code runs on CUDA streams, without streams on any other device,
and with a recording fake that replays other legal orders.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Queue = Literal["compute", "fetch", "return"]
"""`compute`: where the model runs; `fetch`: host to device; `return`: device to host."""


class Streams(Protocol):
    """Device operations that the state offload needs."""

    apart: bool
    """Whether device and host memory are separate; if not, moments are never copied."""

    def allocate(self, elements: int, dtype: torch.dtype) -> Tensor:
        """A device buffer of shape (2, elements), uninitialised, allocated in the order of `compute`."""

    def free(self, buffer: Tensor) -> None:
        """Let `compute` reuse the memory from now on; events must order every other queue's access before this."""

    def copy(self, queue: Literal["fetch", "return"], target: Tensor, source: Tensor) -> None:
        """Enqueue a copy of both moments, shape (2, entries), rows dense; both must stay alive until it is done."""

    def compute(self, action: Callable[[], None], buffer: Tensor) -> None:
        """Enqueue on `compute` an action that reads and writes `buffer`."""

    def mark(self, queue: Queue) -> Any:
        """Record an event that is done when everything enqueued on `queue` so far is done."""

    def wait(self, queue: Queue, event: Any) -> None:
        """Make everything enqueued on `queue` from now on start after `event`."""

    def done(self, event: Any) -> bool:
        """Whether `event` is done; never blocks."""

    def settle(self) -> None:
        """Block the host until all queues are empty."""

    def exposed(self) -> Callable[[], float | None]:
        """After a step: a function that returns the seconds `compute` waited for copies since the last call."""


class NoStreams:
    """Any device without streams: every copy is synchronous."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.apart = device.type != "cpu"
        self._seconds = 0.0

    def allocate(self, elements: int, dtype: torch.dtype) -> Tensor:
        """See `Streams`."""
        return torch.empty(2, elements, dtype=dtype, device=self.device)

    def free(self, buffer: Tensor) -> None:
        """The last reference frees it."""

    def copy(self, queue: Literal["fetch", "return"], target: Tensor, source: Tensor) -> None:
        """Copy now."""
        started = time.perf_counter()
        target.copy_(source)
        self._seconds += time.perf_counter() - started

    def compute(self, action: Callable[[], None], buffer: Tensor) -> None:
        """Act now."""
        action()

    def mark(self, queue: Queue) -> None:
        """Everything is done already."""

    def wait(self, queue: Queue, event: None) -> None:
        """Nothing to wait for."""

    def done(self, event: None) -> bool:
        """Always."""
        return True

    def settle(self) -> None:
        """Nothing to wait for."""

    def exposed(self) -> Callable[[], float | None]:
        """All of the copying time is exposed."""
        seconds, self._seconds = self._seconds, 0.0
        return lambda: seconds


class CudaStreams:
    """One CUDA device: two copy streams beside the stream that the model runs on."""

    apart = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._own = {queue: torch.cuda.Stream(device) for queue in ("fetch", "return")}
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def _stream(self, queue: Queue) -> torch.cuda.Stream:
        # look up the caller's stream every time: a user may run the model on a stream other than the default one
        return torch.cuda.current_stream(self.device) if queue == "compute" else self._own[queue]

    def allocate(self, elements: int, dtype: torch.dtype) -> Tensor:
        """From the pool of the current stream."""
        return torch.empty(2, elements, dtype=dtype, device=self.device)

    def free(self, buffer: Tensor) -> None:
        """The caching allocator reuses it in the order of the stream it was allocated on."""

    def copy(self, queue: Literal["fetch", "return"], target: Tensor, source: Tensor) -> None:
        """An asynchronous copy, if the host side is pinned."""
        with torch.cuda.stream(self._own[queue]):
            # row by row: a whole chunk is strided, and a strided copy between host and device goes through temporaries
            # and # blocks the host (torch, aten/src/ATen/native/cuda/Copy.cu: copy_requires_temporaries)
            for to, of in zip(target, source, strict=True):
                to.copy_(of, non_blocking=True)

    def compute(self, action: Callable[[], None], buffer: Tensor) -> None:
        """Launch on the current stream."""
        action()

    def mark(self, queue: Queue) -> torch.cuda.Event:
        """Record an event."""
        event = torch.cuda.Event()
        event.record(self._stream(queue))
        return event

    def wait(self, queue: Queue, event: torch.cuda.Event) -> None:
        """Wait on the device; two more events measure the time that `compute` waits."""
        stream = self._stream(queue)
        if queue != "compute":
            stream.wait_event(event)
            return
        before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before.record(stream)
        stream.wait_event(event)
        after.record(stream)
        self._waits.append((before, after))

    def done(self, event: torch.cuda.Event) -> bool:
        """Query the event."""
        finished: bool = event.query()
        return finished

    def settle(self) -> None:
        """Wait for both copy streams, and so for the computation whose events they wait for."""
        for stream in self._own.values():
            stream.synchronize()

    def exposed(self) -> Callable[[], float | None]:
        """The waits since the last call; reading them blocks until the last wait is over."""
        waits, self._waits = self._waits, []

        def seconds() -> float:
            if waits:
                waits[-1][1].synchronize()
            milliseconds: float = sum(before.elapsed_time(after) for before, after in waits)
            return milliseconds / 1000

        return seconds
