"""Every meter of one run behind one interface: host, torch's allocator, the driver; by phase where that can be.

A figure that cannot be read is None with its reason, whatever the machine has. Where anybody else was on the GPU, its
memory is None too: a method may follow what is free there, so even its own allocations are not those of a quiet card.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

from harness.measuring.device import AllocatorMeter, NestedPeaks, allocator_settings
from harness.measuring.host import HostMeter, cgroup_peak, proportional_set
from harness.measuring.nvml import NvmlMeter
from harness.records.run import EVALUATION, GpuRecord, Memory


class MemoryMeters:
    """All meters of a run; `phase` brackets what is to be told apart. Make it before CUDA is touched.

    Args:
        device: the run's, "cpu" or "cuda".
        cuda: stands for `torch.cuda`.
        nvml: stands for `pynvml`.
    """

    def __init__(self, device: str, *, cuda: Any = None, nvml: ModuleType | None = None) -> None:
        self._nvml = NvmlMeter(device, nvml)
        self._nvml.counting = False
        self._host, self._allocator = HostMeter(), AllocatorMeter(device, cuda)
        self._host_peaks = NestedPeaks(("host",), lambda: {"host": self._host.peak_bytes()}, self._host.restart)
        self._device_peaks = NestedPeaks(AllocatorMeter.KINDS, self._allocator.peaks, self._allocator.restart)
        self._pss: dict[str, int | None] = {}
        self._pss_why: str | None = None
        self._pinned: int | None = None
        self._watched_steps = 0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Peaks inside the block go under `name`; a phase entered twice keeps its higher peak."""
        with self._host_peaks.phase(name), self._device_peaks.phase(name):
            self._nvml.counting = name != EVALUATION
            try:
                yield
            finally:
                self._nvml.counting = False
        if name not in self._pss:
            self._read_pss(name)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Within a phase: what the harness uses for itself inside the block does not count."""
        with self._host_peaks.left_out(), self._device_peaks.left_out():
            yield

    def parts(self, step: int, period: int) -> Callable[[str], AbstractContextManager[None]]:
        """What brackets the parts of one step: `with part("forward"): ...`.

        Only the allocator's peaks are told apart, in a watched step on CUDA; elsewhere the brackets do nothing.

        Args:
            step: counted from 0.
            period: steps of the method's period, or of the one it is watched by.
        """
        if self._allocator.why is not None or not is_watched(step, period):
            return lambda _: nullcontext()
        self._watched_steps += 1
        return self._device_peaks.phase

    def pinned(self, nbytes: int | None) -> None:
        """What the method says it holds in pinned memory; the highest counts."""
        if nbytes is not None:
            self._pinned = max(nbytes, self._pinned or 0)

    def give_back(self) -> None:
        """After the harness used the device for itself: its memory must not stand in the run's reserved peak."""
        self._allocator.give_back()

    def gpu_record(self) -> tuple[GpuRecord | None, str | None]:
        """The card before and after, or None with the reason."""
        return self._nvml.gpu_record()

    def record(self, *, state_peak_bytes: int | None) -> Memory:
        """Stop sampling and put everything in one record."""
        nvml = self._nvml
        nvml.close()
        self._read_pss("end")
        device = self._device_peaks.by_phase
        void = None if nvml.foreign_why is None else f"void: {nvml.foreign_why}"
        if void:
            device = {kind: dict.fromkeys(peaks) for kind, peaks in device.items()}
        torch_pinned, torch_pinned_why = self._allocator.pinned_peak()
        group, group_why = cgroup_peak()
        return Memory(
            host_peak_bytes=self._host_peaks.by_phase["host"],
            host_peak_bytes_why=self._host.why,
            host_pss_bytes=self._pss,
            host_pss_why=self._pss_why,
            cgroup_peak_bytes=group,
            cgroup_peak_why=group_why,
            method_pinned_peak_bytes=self._pinned,
            method_pinned_why=None if self._pinned is not None else "the method did not say",
            torch_pinned_peak_bytes=torch_pinned,
            torch_pinned_why=torch_pinned_why,
            device_allocated_peak_bytes=device["allocated"],
            device_reserved_peak_bytes=device["reserved"],
            device_why=void or self._allocator.why,
            reserved_to_allocated_ratio=_ratio(device["reserved"].get("steady"), device["allocated"].get("steady")),
            watched_steps=self._watched_steps if self._allocator.why is None else None,
            alloc_conf=allocator_settings(),
            alloc_retries=self._allocator.retries(),
            nvml_process_peak_bytes=None if void else nvml.process_peak_bytes,
            nvml_device_peak_bytes=None if void else nvml.device_peak_bytes,
            nvml_why=void or nvml.process_why,
            nvml_device_delta_peak_bytes=nvml.delta_peak_bytes,
            nvml_delta_why=void or nvml.delta_why,
            nvml_source=None if void else nvml.source,
            nvml_poll_s=nvml.poll_s if nvml.why is None else None,
            foreign_why=nvml.foreign_why,
            state_peak_bytes=state_peak_bytes,
        )

    def _read_pss(self, name: str) -> None:
        self._pss[name], self._pss_why = proportional_set()


def _ratio(reserved: int | None, allocated: int | None) -> float | None:
    return reserved / allocated if reserved is not None and allocated else None


def is_watched(step: int, period: int) -> bool:
    """Whether the parts of a step are told apart: one step a period, in turn its second and its last.

    Each part begins with a reset of the allocator's peak, which a method may itself be reading to see what memory is
    free. So never in the first period, where it may choose by that peak how to go on, nor in any period's first step,
    where it may learn from it; and seldom, so that the clock of the run is not the clock of its watcher.
    """
    number, place = divmod(step, period)
    return number > 0 and place > 0 and place == (1 if number % 2 else period - 1)
