"""Peaks of torch's CUDA allocator by phase, where phases lie within one another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

Peaks = Mapping[str, int | None]
"""One figure a kind, None where it cannot be read."""

ON_THE_CPU = "the run was on the CPU"


class NestedPeaks:
    """Peak by phase of a counter that forgets its peak when it is reset, and is reset whenever a phase begins.

    What the counter says is handed to every open phase before each reset and at each end, so an outer phase's peak is
    the highest of all that was read in it, whatever began inside.

    Args:
        kinds: what the counter counts.
        read: peaks since the last reset, one a kind.
        reset: makes the present values the peaks.
    """

    def __init__(self, kinds: Sequence[str], read: Callable[[], Peaks], reset: Callable[[], None]) -> None:
        self._read, self._reset = read, reset
        self._open: list[dict[str, int]] = []
        self.by_phase: dict[str, dict[str, int | None]] = {kind: {} for kind in kinds}
        """Peak by kind and phase; a phase entered twice keeps its higher peak."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Peaks inside the block go under `name`, and to the phases around it."""
        if self._open:
            self._hand_on()
        self._reset()
        own: dict[str, int] = {}
        self._open.append(own)
        try:
            yield
        finally:
            self._hand_on()
            self._open.pop()
            for kind, phases in self.by_phase.items():
                known = [peak for peak in (own.get(kind), phases.get(name)) if peak is not None]
                phases[name] = max(known, default=None)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """What is used inside the block counts in no phase."""
        self._hand_on()
        yield
        self._reset()

    def _hand_on(self) -> None:
        for kind, peak in self._read().items():
            if peak is not None:
                for phase in self._open:
                    phase[kind] = max(peak, phase.get(kind, 0))


class AllocatorMeter:
    """Torch's caching allocator on the current CUDA device.

    Its counters are the host's own and follow the order of its calls, so reading them waits for nothing on the device.

    Args:
        device: the run's, "cpu" or "cuda"; elsewhere than on CUDA every figure is None.
        cuda: stands for `torch.cuda`.
    """

    KINDS = ("allocated", "reserved")

    def __init__(self, device: str, cuda: Any = None) -> None:
        self.why = None if device == "cuda" else ON_THE_CPU
        if self.why is None:
            import torch

            self._cuda = torch.cuda if cuda is None else cuda
            self._retries_before = self._count_retries()

    def restart(self) -> None:
        """Make the present values the peaks."""
        if self.why is None:
            self._cuda.reset_peak_memory_stats()

    def peaks(self) -> dict[str, int | None]:
        """Peaks since the last restart, in one reading: the flat form of the counters takes several times as long."""
        if self.why is not None:
            return dict.fromkeys(self.KINDS)
        counters = self._cuda.memory_stats_as_nested_dict()
        return {kind: int(counters[f"{kind}_bytes"]["all"]["peak"]) for kind in self.KINDS}

    def retries(self) -> int | None:
        """Times that the allocator ran out and emptied its cache, since this meter was made."""
        return None if self.why is not None else self._count_retries() - self._retries_before

    def pinned_peak(self) -> tuple[int | None, str | None]:
        """Peak of torch's own pinned host memory since the process began, or None with the reason."""
        if self.why is not None:
            return None, self.why
        if not hasattr(self._cuda, "host_memory_stats"):
            return None, "this version of torch keeps no statistics of pinned memory"
        peak = self._cuda.host_memory_stats().get("allocated_bytes.peak")
        return (None, "torch's statistics of pinned memory name no peak") if peak is None else (int(peak), None)

    def give_back(self) -> None:
        """Return unused memory to the driver: what the harness used for itself must not stand in the run's figures."""
        if self.why is None:
            self._cuda.empty_cache()

    def _count_retries(self) -> int:
        return int(self._cuda.memory_stats_as_nested_dict().get("num_alloc_retries", 0))


def allocator_settings() -> str:
    """PYTORCH_ALLOC_CONF as it is set, or under its former name PYTORCH_CUDA_ALLOC_CONF; empty where neither is."""
    return os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
