"""One interface to all meters: host, torch's allocator, the driver; by phase where possible.

A figure that cannot be read is None, with the reason. If another process was on the GPU, device memory is None too: a
method may adapt to the free memory, so even its own allocations differ from those on an otherwise idle card.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType
from typing import Any

from harness.measuring.device import ON_THE_CPU, AllocatorMeter, PhasePeaks, allocator_settings
from harness.measuring.energy import Joules
from harness.measuring.host import HostMeter, cgroup_peak, proportional_set
from harness.measuring.nvml import NvmlMeter
from harness.measuring.rates import transfer_rates
from harness.records.device import DeviceKind, DeviceRecord
from harness.records.measured import EVALUATION, GpuRecord, GpuState, Memory, largest

LEFTOVER_BYTES = 16 * 2**20
"""Memory that may stay allocated after a job has released the device: handles and small constants of libraries."""


class Meters:
    """All meters of a process; use `phase` to get separate figures. Create it before CUDA is initialised.

    Args:
        device: of the measured code.
        cuda: a stand-in for `torch.cuda`, for tests.
        nvml: a stand-in for `pynvml`, for tests.
    """

    def __init__(self, device: DeviceKind, *, cuda: Any = None, nvml: ModuleType | None = None) -> None:
        self.device = device
        self._nvml = NvmlMeter(device, nvml)
        self._nvml.counting = False
        self._energy = self._nvml.energy_meter()
        self._host, self._allocator = HostMeter(), AllocatorMeter(device, cuda)
        self._left_behind_limit = sys.maxsize
        self._forget_peaks()

    def restart(self) -> None:
        """Forget the peaks and the foreign processes seen so far: a new measurement begins."""
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
        """Begin a phase, inside those that are open."""
        self._host_peaks.begin(name)
        self._device_peaks.begin(name)
        self._nvml.counting = name != EVALUATION

    def end(self, name: str) -> Mapping[str, int]:
        """End an open phase; returns its allocator peaks, `allocated` and `reserved` (none on a CPU)."""
        peaks = self._device_peaks.end(name)
        self._host_peaks.end(name)
        self._nvml.counting = False
        if name not in self._pss:
            self._read_pss(name)
        return peaks

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record peaks inside the block under `name`; a phase entered twice keeps its higher peak."""
        self.begin(name)
        try:
            yield
        finally:
            self.end(name)

    @contextmanager
    def excluded(self) -> Iterator[None]:
        """Within a phase: memory that the harness itself uses inside the block does not count."""
        with self._host_peaks.excluded(), self._device_peaks.excluded():
            yield

    def parts(self, step: int, period: int) -> Callable[[str], AbstractContextManager[None]]:
        """Returns the context manager for the parts of one step: `with part("forward"): ...`.

        It separates only the allocator's peaks, in a watched step on CUDA; elsewhere it does nothing.

        Args:
            step: counted from 0.
            period: steps in the method's period, or in the fallback period that the harness watches it by.
        """
        if self._allocator.why is not None or not is_watched(step, period):
            return lambda _: nullcontext()
        self._watched_steps += 1
        return self._device_peaks.phase

    def peak_kept(self) -> AbstractContextManager[None]:
        """Methods may read the allocator's peak, which is reset at every phase: inside the block they see no reset."""
        # importing this module must not import torch, since a GPU is leased before torch is imported
        from grass.host import current, using
        from harness.measuring.kept_peak import PeakNeverFalls

        return using(PeakNeverFalls(current(), lambda: self._device_peaks.highest.get("allocated", 0)))

    # ------------------------------------------------------------ samples

    def pinned(self, nbytes: int | None) -> None:
        """Note the pinned memory that the method reports; the highest value counts."""
        if nbytes is not None:
            self._pinned = max(nbytes, self._pinned or 0)

    def sample_driver(self) -> None:
        """Take one more sample from the driver while the run's memory is still allocated."""
        self._nvml.sample_now()

    @property
    def foreign_why(self) -> str | None:
        """Which other process was seen on the GPU, in words; None if there was none."""
        return self._nvml.foreign_why

    # ------------------------------------------------------------ energy

    def start_energy(self) -> None:
        """Begin a span of energy; the device has done what came before."""
        self._energy.start()

    def stop_energy(self) -> Joules:
        """End it; the device has done what belongs to it. Unknown where it is void, and where there is no counter."""
        found, void = self._energy.stop(), self.energy_void_why
        return found if void is None else Joules(None, void)

    @property
    def energy_void_why(self) -> str | None:
        """Why no energy so far is known to be this process's: a neighbour, or nobody who looks for one; else None."""
        if self.foreign_why is not None:
            return f"void: {self.foreign_why}"
        return self._nvml.why

    # ------------------------------------------------------------ the device

    def synchronise(self) -> None:
        """Wait for the device."""
        self._allocator.synchronise()

    def allocated_bytes(self) -> int | None:
        """Bytes of live tensors on the device now; None on a CPU."""
        return self._allocator.allocated()

    def empty_cache(self) -> None:
        """Free what the harness itself used on the device, so that it does not count in the run's reserved peak."""
        self._allocator.empty_cache()

    def clean(self) -> bool:
        """Free unused memory; returns whether the device is back in the state of the first call."""
        gc.collect()
        self._allocator.free_workspaces()
        self._allocator.empty_cache()
        allocated = self._allocator.allocated() or 0
        if self._left_behind_limit == sys.maxsize:
            self._left_behind_limit = allocated + LEFTOVER_BYTES
        return allocated <= self._left_behind_limit

    def gpu_record(self) -> tuple[GpuRecord | None, str | None]:
        """The card before and after, or None with the reason."""
        return self._nvml.gpu_record()

    def highest(self) -> tuple[int | None, int | None]:
        """Peaks so far over all phases but evaluation: resident set, and torch's allocator (None as in `record`)."""
        device = None if self.foreign_why else largest(self._device_peaks.by_phase["allocated"], without=EVALUATION)
        return largest(self._host_peaks.by_phase["host"], without=EVALUATION), device

    def card_now(self) -> tuple[GpuState | None, str | None]:
        """Clocks, power and temperature at this moment, or None with the reason."""
        card, why = self._nvml.gpu_record()
        return (None, why) if card is None else (card.after, None)

    @property
    def device_name(self) -> str:
        """The card's name, or `cpu`."""
        return self._allocator.device_name

    def describe(self) -> DeviceRecord:
        """The device with its copy rates, which take some tenths of a second to measure."""
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
        """Take a last sample, and stop sampling the driver."""
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
    """Whether the peaks of a step's parts are recorded: in one step per period, alternately its second and its last.

    Each part begins with a reset of the allocator's peak, which a method may itself read to see how much memory is
    free. So no step of the first period is watched, where a method may choose its mode by that peak, nor any period's
    first step, where it may learn from it. Few steps are watched, so that watching hardly affects the run's time.
    """
    number, place = divmod(step, period)
    return number > 0 and place > 0 and place == (1 if number % 2 else period - 1)
