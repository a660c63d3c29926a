"""Torch's CUDA allocator, and peaks by phase for nested phases."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

Peaks = Mapping[str, int | None]
"""One figure per kind, None where it cannot be read."""

ON_THE_CPU = "the run was on the CPU"


class PhasePeaks:
    """Peaks by phase, from a counter whose peak is reset whenever a phase begins.

    Before each reset and at the end of each phase, the counter is read and every open phase is updated. So an outer
    phase's peak is the highest value read in it, including those of the phases inside it.

    Args:
        kinds: what the counter counts.
        read: returns the peaks since the last reset, one per kind.
        reset: resets the peaks to the present values.
    """

    def __init__(self, kinds: Sequence[str], read: Callable[[], Peaks], reset: Callable[[], None]) -> None:
        self._read, self._reset = read, reset
        self._open: dict[str, dict[str, int]] = {}
        self.by_phase: dict[str, dict[str, int | None]] = {kind: {} for kind in kinds}
        """Peak by kind and phase; a phase entered twice keeps its higher peak."""
        self.highest: dict[str, int] = {}
        """Highest value read so far, by kind, whatever the phase."""

    def begin(self, name: str) -> None:
        """Begin a phase, inside those that are open."""
        if self._open:
            self._hand_on()
        self._reset()
        self._open[name] = {}

    def end(self, name: str) -> Mapping[str, int]:
        """End an open phase; returns its peaks since it began, by kind (none where nothing can be read)."""
        self._hand_on()
        own = self._open.pop(name)
        for kind, phases in self.by_phase.items():
            known = [peak for peak in (own.get(kind), phases.get(name)) if peak is not None]
            phases[name] = max(known, default=None)
        return own

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record peaks inside the block under `name`, and for the phases around it."""
        self.begin(name)
        try:
            yield
        finally:
            self.end(name)

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Count memory used inside the block in no phase."""
        self._hand_on()
        yield
        self._reset()

    def _hand_on(self) -> None:
        for kind, peak in self._read().items():
            if peak is not None:
                for peaks in (self.highest, *self._open.values()):
                    peaks[kind] = max(peak, peaks.get(kind, 0))


class AllocatorMeter:
    """Torch's caching allocator on the current CUDA device.

    Its counters are kept on the host, in the order of the calls, so reading them does not wait for the device.

    Args:
        device: the run's, "cpu" or "cuda"; on a CPU every figure is None.
        cuda: a stand-in for `torch.cuda`, for tests.
    """

    KINDS = ("allocated", "reserved")

    def __init__(self, device: str, cuda: Any = None) -> None:
        self.why = None if device == "cuda" else ON_THE_CPU
        if self.why is None:
            import torch

            self._cuda = torch.cuda if cuda is None else cuda
            self.begin()

    def begin(self) -> None:
        """Count retries from here on."""
        if self.why is None:
            self._retries_before = self._count_retries()

    def restart(self) -> None:
        """Reset the peaks to the present values."""
        if self.why is None:
            self._cuda.reset_peak_memory_stats()

    def peaks(self) -> dict[str, int | None]:
        """Peaks since the last restart. Reads the nested statistics: flattening them takes several times as long."""
        if self.why is not None:
            return dict.fromkeys(self.KINDS)
        counters = self._cuda.memory_stats_as_nested_dict()
        return {kind: int(counters[f"{kind}_bytes"]["all"]["peak"]) for kind in self.KINDS}

    def retries(self) -> int | None:
        """Number of times since `begin` that the allocator ran out of memory and emptied its cache."""
        return None if self.why is not None else self._count_retries() - self._retries_before

    def pinned_peak(self) -> tuple[int | None, str | None]:
        """Peak of torch's own pinned host memory since the process began, or None with the reason."""
        if self.why is not None:
            return None, self.why
        if not hasattr(self._cuda, "host_memory_stats"):
            return None, "this version of torch keeps no statistics of pinned memory"
        peak = self._cuda.host_memory_stats().get("allocated_bytes.peak")
        return (None, "torch's statistics of pinned memory name no peak") if peak is None else (int(peak), None)

    def allocated(self) -> int | None:
        """Bytes of live tensors now."""
        return int(self._cuda.memory_allocated()) if self.why is None else None

    @property
    def device_name(self) -> str:
        """The card's name, or `cpu`."""
        return str(self._cuda.get_device_name()) if self.why is None else "cpu"

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.why is None:
            self._cuda.synchronize()

    def empty_cache(self) -> None:
        """Return unused memory to the driver: memory that the harness used must not count in the run's figures."""
        if self.why is None:
            self._cuda.empty_cache()

    def free_workspaces(self) -> None:
        """Free the workspace that each matrix-library handle keeps in torch's pool."""
        if self.why is None:
            import torch

            drop = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
            if drop is not None:
                drop()

    def _count_retries(self) -> int:
        return int(self._cuda.memory_stats_as_nested_dict().get("num_alloc_retries", 0))


def allocator_settings() -> str:
    """Value of PYTORCH_ALLOC_CONF, or of its former name PYTORCH_CUDA_ALLOC_CONF; empty where neither is set."""
    return os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
