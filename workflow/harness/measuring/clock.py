"""The one clock of steps: CUDA events on the device, a monotonic counter elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal


class StepClock:
    """Seconds from `start` to `stop`, without the time in `paused` blocks; or of successive laps.

    On CUDA it records events on the model's stream. `stop` waits for that stream alone, so copies that a method makes
    on other streams continue into the next step, as in an ordinary training loop. Elsewhere it uses
    `time.perf_counter`.

    Args:
        device: the run's, "cpu" or "cuda".
        cuda: a stand-in for `torch.cuda`, for tests.
    """

    def __init__(self, device: str, cuda: Any = None) -> None:
        self.kind: Literal["perf_counter", "cuda events"] = "cuda events" if device == "cuda" else "perf_counter"
        if device == "cuda" and cuda is None:
            import torch

            cuda = torch.cuda
        self._cuda = cuda
        self._spans: list[tuple[Any, Any]] = []
        self._laps: list[tuple[Any, Any]] = []
        self._began: Any = None

    def start(self) -> None:
        """Begin a new step."""
        self._spans = []
        self._began = self._mark()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time inside the block."""
        self._spans.append((self._began, self._mark()))
        yield
        self._began = self._mark()

    def lap(self) -> None:
        """End the step and begin the next at once, without waiting for the device; `laps` gives the seconds later."""
        self._laps.append((self._began, self._mark()))
        self._began = self._laps[-1][1]

    def laps(self) -> list[float]:
        """Seconds of every lap since the clock was made; waits for the device."""
        if self._laps and self.kind == "cuda events":
            self._laps[-1][1].synchronize()
        return [self._seconds(begin, end) for begin, end in self._laps]

    def stop(self) -> float:
        """End the step and return its seconds."""
        self._spans.append((self._began, self._mark()))
        if self.kind == "cuda events":
            self._spans[-1][1].synchronize()
        return sum(self._seconds(begin, end) for begin, end in self._spans)

    def _seconds(self, begin: Any, end: Any) -> float:
        return float(end - begin) if self.kind == "perf_counter" else float(begin.elapsed_time(end)) / 1000

    def _mark(self) -> Any:
        if self.kind == "perf_counter":
            return time.perf_counter()
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event
