"""Copies between device and host beside the computation: three queues, ordered by events and by nothing else.

The state offload speaks to this interface alone, so the same code runs on CUDA streams, without streams on any other
device, and under a recording fake that replays other legal orders.
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
    """What the state offload needs of a device."""

    apart: bool
    """Device and host memory are two things; where they are one, moments have nowhere else to be."""

    def allocate(self, elements: int, dtype: torch.dtype) -> Tensor:
        """A device buffer of shape (2, elements), contents undefined, in the order of `compute`."""

    def free(self, buffer: Tensor) -> None:
        """`compute` may reuse the memory from here on: every other queue's access must come before, by an event."""

    def copy(self, queue: Literal["fetch", "return"], target: Tensor, source: Tensor) -> None:
        """Enqueue a copy of both moments, shape (2, entries), rows dense; both must stay alive until it is done."""

    def compute(self, action: Callable[[], None], buffer: Tensor) -> None:
        """Enqueue on `compute` an action that reads and writes `buffer`."""

    def mark(self, queue: Queue) -> Any:
        """An event that is done when everything enqueued on `queue` so far is done."""

    def wait(self, queue: Queue, event: Any) -> None:
        """What is enqueued on `queue` from here on starts after `event`."""

    def done(self, event: Any) -> bool:
        """Whether `event` is done by now; never blocks."""

    def settle(self) -> None:
        """Block the host until all queues are empty."""

    def exposed(self) -> Callable[[], float | None]:
        """Ask after a step: a function that says how many seconds `compute` waited for copies since the last asking."""


class NoStreams:
    """Any device without streams of its own: every copy is done, and waited for, when it is asked for."""

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
    """One CUDA device: two streams of its own beside the stream that the model runs on."""

    apart = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._own = {queue: torch.cuda.Stream(device) for queue in ("fetch", "return")}
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def _stream(self, queue: Queue) -> torch.cuda.Stream:
        # the caller's own stream, asked for every time: a user may run the model on another than the default one
        return torch.cuda.current_stream(self.device) if queue == "compute" else self._own[queue]

    def allocate(self, elements: int, dtype: torch.dtype) -> Tensor:
        """From the pool of the current stream."""
        return torch.empty(2, elements, dtype=dtype, device=self.device)

    def free(self, buffer: Tensor) -> None:
        """The caching allocator reuses it in the order of the stream it was allocated on."""

    def copy(self, queue: Literal["fetch", "return"], target: Tensor, source: Tensor) -> None:
        """An asynchronous copy, if the host side is pinned."""
        with torch.cuda.stream(self._own[queue]):
            # row by row: as a whole a chunk is strided, and a strided copy between host and device goes through
            # temporaries and blocks the host (torch, aten/src/ATen/native/cuda/Copy.cu: copy_requires_temporaries)
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
        """Wait on the device; the time that `compute` waits is measured by two more events."""
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
        """Ask the driver."""
        finished: bool = event.query()
        return finished

    def settle(self) -> None:
        """Wait for both copying streams; what the model runs is waited for through their events."""
        for stream in self._own.values():
            stream.synchronize()

    def exposed(self) -> Callable[[], float | None]:
        """The waits since the last asking; reading them blocks until the last is over."""
        waits, self._waits = self._waits, []

        def seconds() -> float:
            if waits:
                waits[-1][1].synchronize()
            milliseconds: float = sum(before.elapsed_time(after) for before, after in waits)
            return milliseconds / 1000

        return seconds
