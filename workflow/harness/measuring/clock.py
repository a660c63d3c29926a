"""The one clock of steps: CUDA events on the device, a monotonic counter elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from harness.measuring.processors import ProcessorTime


class StepClock:
    """Seconds from `start` to `stop`, without the time in `paused` blocks; or of successive laps.

    On a CPU it also reads what processor time the step had (`processor`), outside the seconds that it counts.

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
        self._processors: list[ProcessorTime] = []
        self._processors_began: ProcessorTime | None = None
        self._laps: list[tuple[Any, Any]] = []
        self._began: Any = None

    def start(self) -> None:
        """Begin a new step."""
        self._spans, self._processors = [], []
        self._begin_span()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time inside the block."""
        self._end_span()
        yield
        self._begin_span()

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
        self._end_span()
        if self.kind == "cuda events":
            self._spans[-1][1].synchronize()
        return sum(self._seconds(begin, end) for begin, end in self._spans)

    @property
    def processor(self) -> ProcessorTime | None:
        """Processor time of the step that ended last; None on CUDA, where steps are not the processors' work."""
        if self.kind == "cuda events":
            return None
        waited = [span.waited_s for span in self._processors]
        known = [seconds for seconds in waited if seconds is not None]
        return ProcessorTime(
            sum(span.ran_s for span in self._processors), sum(known) if len(known) == len(waited) else None
        )

    def _begin_span(self) -> None:
        if self.kind == "perf_counter":
            self._processors_began = ProcessorTime.now()
        self._began = self._mark()

    def _end_span(self) -> None:
        self._spans.append((self._began, self._mark()))
        if self._processors_began is not None:
            self._processors.append(ProcessorTime.now().since(self._processors_began))

    def _seconds(self, begin: Any, end: Any) -> float:
        return float(end - begin) if self.kind == "perf_counter" else float(begin.elapsed_time(end)) / 1000

    def _mark(self) -> Any:
        if self.kind == "perf_counter":
            return time.perf_counter()
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event
