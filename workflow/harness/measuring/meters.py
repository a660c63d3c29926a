"""The one front of all meters: host, torch's allocator, the driver; by phase where that can be.

A figure that cannot be read is None with its reason, whatever the machine has. Where anybody else was on the GPU, its
memory is None too: a method may follow what is free there, so even its own allocations are not those of a quiet card.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

from harness.measuring.device import ON_THE_CPU, AllocatorMeter, PhasePeaks, allocator_settings
from harness.measuring.host import HostMeter, cgroup_peak, proportional_set
from harness.measuring.nvml import NvmlMeter
from harness.measuring.rates import transfer_rates
from harness.records.device import DeviceKind, DeviceRecord
from harness.records.run import EVALUATION, GpuRecord, GpuState, Memory

LEFTOVER_BYTES = 16 * 2**20
"""What may stay behind on the device when its user has gone: handles and small constants of libraries."""


class Meters:
    """All meters of a process; `phase` brackets what is to be told apart. Make it before CUDA is touched.

    Args:
        device: of what is measured.
        cuda: stands for `torch.cuda`.
        nvml: stands for `pynvml`.
    """

    def __init__(self, device: DeviceKind, *, cuda: Any = None, nvml: ModuleType | None = None) -> None:
        self.device = device
        self._nvml = NvmlMeter(device, nvml)
        self._nvml.counting = False
        self._host, self._allocator = HostMeter(), AllocatorMeter(device, cuda)
        self._left_behind_limit = sys.maxsize
        self._forget_peaks()

    def restart(self) -> None:
        """Forget the peaks so far, and who was seen on the GPU: something else is measured from here on."""
        self._nvml.restart()
        self._forget_peaks()

    def _forget_peaks(self) -> None:
        self._allocator.begin()
        self._host_peaks = PhasePeaks(("host",), lambda: {"host": self._host.peak_bytes()}, self._host.restart)
        self._device_peaks = PhasePeaks(AllocatorMeter.KINDS, self._allocator.peaks, self._allocator.restart)
        self._pss: dict[str, int | None] = {}
        self._pss_why: str | None = None
        self._pinned: int | None = None
        self._watched_steps = 0

    # ------------------------------------------------------------ phases

    def begin(self, name: str) -> None:
        """A phase begins, inside those that are open."""
        self._host_peaks.begin(name)
        self._device_peaks.begin(name)
        self._nvml.counting = name != EVALUATION

    def end(self, name: str) -> Mapping[str, int]:
        """An open phase ends; the allocator's peaks in it, `allocated` and `reserved` (none where nobody counts)."""
        peaks = self._device_peaks.end(name)
        self._host_peaks.end(name)
        self._nvml.counting = False
        if name not in self._pss:
            self._read_pss(name)
        return peaks

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Peaks inside the block go under `name`; a phase entered twice keeps its higher peak."""
        self.begin(name)
        try:
            yield
        finally:
            self.end(name)

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

    def peak_kept(self) -> AbstractContextManager[None]:
        """A method may follow the allocator's peak, which falls back at every phase: inside the block it does not."""
        # importing meters must not import torch, since a GPU is leased before that
        from grass.host import current, using
        from harness.measuring.kept_peak import PeakNeverFalls

        return using(PeakNeverFalls(current(), lambda: self._device_peaks.highest.get("allocated", 0)))

    # ------------------------------------------------------------ samples

    def pinned(self, nbytes: int | None) -> None:
        """What the method says it holds in pinned memory; the highest counts."""
        if nbytes is not None:
            self._pinned = max(nbytes, self._pinned or 0)

    def sample_driver(self) -> None:
        """One more look at what the driver says, while everything is still held."""
        self._nvml.sample_now()

    @property
    def foreign_why(self) -> str | None:
        """Who else was seen on the GPU."""
        return self._nvml.foreign_why

    # ------------------------------------------------------------ the device

    def synchronise(self) -> None:
        """Wait for the device."""
        self._allocator.synchronise()

    def allocated_bytes(self) -> int | None:
        """Bytes of live tensors on the device now; None on a CPU."""
        return self._allocator.allocated()

    def empty_cache(self) -> None:
        """After the harness used the device for itself: its memory must not stand in the run's reserved peak."""
        self._allocator.empty_cache()

    def clean(self) -> bool:
        """Give back what no tensor needs; whether the device is as it was when this was first called."""
        gc.collect()
        self._allocator.drop_workspaces()
        self._allocator.empty_cache()
        allocated = self._allocator.allocated() or 0
        if self._left_behind_limit == sys.maxsize:
            self._left_behind_limit = allocated + LEFTOVER_BYTES
        return allocated <= self._left_behind_limit

    def gpu_record(self) -> tuple[GpuRecord | None, str | None]:
        """The card before and after, or None with the reason."""
        return self._nvml.gpu_record()

    def card_now(self) -> tuple[GpuState | None, str | None]:
        """Clocks, power and temperature at this moment, or None with the reason."""
        card, why = self._nvml.gpu_record()
        return (None, why) if card is None else (card.after, None)

    @property
    def device_name(self) -> str:
        """The card's name, or `cpu`."""
        return self._allocator.device_name

    def describe(self) -> DeviceRecord:
        """The device, with the rates of its copies, which take some tenths of a second to measure."""
        import torch

        card, why = self._nvml.gpu_record()
        on_gpu = self.device == "cuda"
        major, minor = torch.cuda.get_device_capability() if on_gpu else (0, 0)
        return DeviceRecord(
            kind=self.device,
            name=self.device_name,
            total_bytes=int(torch.cuda.get_device_properties(0).total_memory) if on_gpu else None,
            total_bytes_why=None if on_gpu else ON_THE_CPU,
            compute_capability=f"{major}.{minor}" if on_gpu else None,
            torch_cuda=torch.version.cuda if on_gpu else None,
            alloc_conf=allocator_settings(),
            threads=torch.get_num_threads(),
            card=card,
            card_why=why,
            transfer=transfer_rates() if on_gpu else None,
            transfer_why=None if on_gpu else ON_THE_CPU,
        )

    # ------------------------------------------------------------ what came of it

    def close(self) -> None:
        """Look once more, and stop sampling the driver."""
        self._nvml.close()

    def record(self, *, state_peak_bytes: int | None) -> Memory:
        """Everything since the start, or since `restart`, in one record."""
        nvml = self._nvml
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
