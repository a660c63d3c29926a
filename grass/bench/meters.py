"""Clock and memory gauge of a device: the one place of the benchmark that calls what only CUDA has."""

from __future__ import annotations

import gc
import statistics
import time
from typing import Any, Protocol

import torch

COPY_BYTES = 256 * 2**20
"""Size of the pinned buffers with which the rates of the bus are measured."""


class Meter(Protocol):
    """Time and memory of a device; memory is None where no allocator counts."""

    def mark(self) -> Any:
        """A point in time, in the order of the work enqueued so far."""

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds between two marks, after `wait`."""

    def wait(self) -> None:
        """Block until all enqueued work is done."""

    def reset_peaks(self) -> None:
        """Count peaks anew from here on."""

    def memory(self) -> dict[str, int | None]:
        """Bytes: `allocated_bytes` now, `allocated_peak_bytes` and `reserved_peak_bytes` since `reset_peaks`; number:
        `allocation_retries` since the process began, more than 0 of which make times worthless.
        """

    def tidy(self) -> None:
        """Drop garbage and give unused memory back to the driver."""


class HostMeter:
    """A device whose work is done when the call returns."""

    def mark(self) -> float:
        """Now."""
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        """See `Meter`."""
        return end - start

    def wait(self) -> None:
        """Nothing to wait for."""

    def reset_peaks(self) -> None:
        """Nobody counts."""

    def memory(self) -> dict[str, int | None]:
        """Nobody counts."""
        counts = ("allocated_bytes", "allocated_peak_bytes", "reserved_peak_bytes", "allocation_retries")
        return dict.fromkeys(counts)

    def tidy(self) -> None:
        """Drop garbage."""
        gc.collect()


class CudaMeter:
    """A CUDA device: events on the current stream, and the caching allocator's counts."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def mark(self) -> torch.cuda.Event:
        """An event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """See `Meter`."""
        milliseconds: float = start.elapsed_time(end)
        return milliseconds / 1000

    def wait(self) -> None:
        """Synchronise the device."""
        torch.cuda.synchronize(self.device)

    def reset_peaks(self) -> None:
        """See `Meter`."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def memory(self) -> dict[str, int | None]:
        """See `Meter`."""
        return {
            "allocated_bytes": torch.cuda.memory_allocated(self.device),
            "allocated_peak_bytes": torch.cuda.max_memory_allocated(self.device),
            "reserved_peak_bytes": torch.cuda.max_memory_reserved(self.device),
            "allocation_retries": torch.cuda.memory_stats(self.device).get("num_alloc_retries", 0),
        }

    def tidy(self) -> None:
        """See `Meter`."""
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()


def meter_for(device: torch.device) -> Meter:
    """The meter of `device`."""
    return CudaMeter(device) if device.type == "cuda" else HostMeter()


def copy_rates(device: torch.device, *, repeats: int = 5, copies: int = 8) -> dict[str, float] | None:
    """Bytes a second of pinned copies to a CUDA device, from it, and both ways at once (their sum).

    Medians over `repeats` of `copies` copies in a row each way, the three interleaved; None on any other device.
    """
    if device.type != "cuda":
        return None
    host = [torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    there = [torch.empty(COPY_BYTES, dtype=torch.uint8, device=device) for _ in range(2)]
    queues = [torch.cuda.Stream(device) for _ in range(2)]
    to_device, from_device = (queues[0], there[0], host[0]), (queues[1], host[1], there[1])
    ways = {"host_to_device": [to_device], "device_to_host": [from_device], "both": [to_device, from_device]}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(1 + repeats):
        for name, together in ways.items():
            torch.cuda.synchronize(device)
            start = torch.cuda.Event(enable_timing=True)
            start.record(torch.cuda.current_stream(device))
            ends = []
            for queue, _, _ in together:
                queue.wait_event(start)
            for _ in range(copies):
                for queue, target, source in together:
                    with torch.cuda.stream(queue):
                        target.copy_(source, non_blocking=True)
            for queue, _, _ in together:
                ends.append(torch.cuda.Event(enable_timing=True))
                ends[-1].record(queue)
            torch.cuda.synchronize(device)
            seconds = max(start.elapsed_time(end) for end in ends) / 1000
            if repeat:  # the first is warm-up
                rates[name].append(len(together) * copies * COPY_BYTES / seconds)
    return {f"{name}_bytes_per_s": statistics.median(found) for name, found in rates.items()}
