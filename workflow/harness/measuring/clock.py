"""The one clock of steps: CUDA events on the device, a monotonic counter elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal


class StepClock:
    """Seconds from `start` to `stop`, without the time in `paused` blocks; or of laps that follow one another.

    On CUDA the marks are events on the stream that the model runs on: `stop` waits for that stream alone, so a method's
    own copies beside it run on into the next step, as they do in a loop of the user's. Elsewhere `time.perf_counter`.

    Args:
        device: the run's, "cpu" or "cuda".
        cuda: stands for `torch.cuda`.
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
        """A new step begins."""
        self._spans = []
        self._began = self._mark()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not the step's."""
        self._spans.append((self._began, self._mark()))
        yield
        self._began = self._mark()

    def lap(self) -> None:
        """The step ends and the next one begins at once; nothing is waited for, and `laps` tells the seconds later."""
        self._laps.append((self._began, self._mark()))
        self._began = self._laps[-1][1]

    def laps(self) -> list[float]:
        """Seconds of every lap since the clock was made; waits for the device."""
        if self._laps and self.kind == "cuda events":
            self._laps[-1][1].synchronize()
        return [self._seconds(begin, end) for begin, end in self._laps]

    def stop(self) -> float:
        """The step ends; its seconds."""
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
