"""Allocator peaks by phase, without the method noticing that anybody reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol
from unittest.mock import patch

STARTING = "load"
"""The phase that is no part of a step: what happens in it does not count in a cell's peak."""


class PeakCounter(Protocol):
    """What is needed of `harness.measuring.device.AllocatorMeter`."""

    why: str | None

    def peaks(self) -> dict[str, int | None]:
        """Peaks `allocated` and `reserved` since the last restart; None where nobody counts."""

    def restart(self) -> None:
        """Make the present values the peaks."""


class PhasePeaks:
    """Peaks by phase of one cell. On a CPU only the name of the phase is kept.

    Args:
        counter: of the device's memory.
        draw: tells which layers are active.
    """

    def __init__(self, counter: PeakCounter, draw: Callable[[], tuple[int, ...] | None] = lambda: None) -> None:
        self.allocated: dict[str, int] = {}
        self.reserved: dict[str, int] = {}
        self.phase = STARTING
        self.draw = draw
        self.peak_bytes: int | None = None
        """Largest allocated peak of all phases but `load`."""
        self.peak_phase: str | None = None
        self.peak_draw: tuple[int, ...] | None = None
        self._counter = counter
        self._forwards = 0
        self._highest = 0

    def enter(self, phase: str) -> None:
        """Another phase begins; `first_step` is one beside the others, from the first forward pass to the second."""
        self.close()
        self.phase = phase
        self._forwards += phase == "forward"

    def name(self, phase: str) -> None:
        """Another phase begins, and nobody reads or restarts the peaks: where steps are timed, or follow the peak."""
        self.phase = phase

    def close(self) -> None:
        """The phase under way gets the peaks since the last call."""
        peaks = self._counter.peaks()
        allocated, reserved = peaks["allocated"], peaks["reserved"]
        if allocated is None or reserved is None:
            return
        for name in (self.phase, "first_step") if self._forwards == 1 else (self.phase,):
            self.allocated[name] = max(allocated, self.allocated.get(name, 0))
            self.reserved[name] = max(reserved, self.reserved.get(name, 0))
        if self.phase != STARTING and allocated > (self.peak_bytes or 0):
            self.peak_bytes, self.peak_phase, self.peak_draw = allocated, self.phase, self.draw()
        self._highest = max(self._highest, allocated)
        self._counter.restart()

    @contextmanager
    def unnoticed(self) -> Iterator[None]:
        """A method may follow the allocator's peak, which falls back at every phase: inside the block it does not."""
        if self._counter.why is not None:
            yield
            return
        import torch

        read = torch.cuda.max_memory_allocated

        def highest(device: Any = None) -> int:
            return max(self._highest, read(device))

        with patch("torch.cuda.max_memory_allocated", highest):
            yield
