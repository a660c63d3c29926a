"""All that this package takes from `harness.measuring`, in the shape in which it is used here: begun anew by each cell.

One process measures many cells. So peaks begin anew with each of them, and so does the look at who else is on the GPU.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

from harness.measuring.device import ON_THE_CPU, AllocatorMeter, allocator_settings
from harness.measuring.gpu import lease_for
from harness.measuring.host import HostMeter, cgroup_peak, proportional_set
from harness.measuring.nvml import NvmlMeter
from harness.measuring.rates import transfer_rates
from harness.records.device import DeviceKind, DeviceRecord
from harness.records.run import GpuState

LEFTOVER_BYTES = 16 * 2**20
"""What a cell may leave behind on the device: handles and small constants of libraries."""


def device_lease(device: DeviceKind) -> AbstractContextManager[Any]:
    """Hold a GPU where the device is "cuda"; take it before torch is imported.

    Raises:
        NoGpuError: there is none.
    """
    return lease_for(device)


class Instruments:
    """The meters of one process; make it before torch touches the device."""

    def __init__(self, device: DeviceKind) -> None:
        self.device = device
        self._nvml = NvmlMeter(device)
        self.allocator = AllocatorMeter(device)
        self.host = HostMeter()
        self.transfer = transfer_rates() if device == "cuda" else None
        self._pss: int | None = None
        self._pinned: int | None = None
        self._before = sys.maxsize
        self.clean()
        self._before = self.allocated_bytes() or 0

    def begin(self) -> None:
        """A cell begins: forget the peaks so far, and who was seen on the GPU."""
        self.clean()
        self.allocator.restart()
        self.host.restart()
        self._retries = self.allocator.retries()
        self._nvml.process_peak_bytes = self._nvml.device_peak_bytes = self._nvml.foreign_why = None
        self._pss = self._pinned = None

    def clean(self) -> bool:
        """Give back what no tensor needs; whether the device is as it was when this process began."""
        gc.collect()
        if self.device != "cuda":
            return True
        import torch

        # every matrix library handle keeps a buffer of its own from torch's pool
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        if clear is not None:
            clear()
        self.allocator.give_back()
        return torch.cuda.memory_allocated() <= self._before + LEFTOVER_BYTES

    def allocated_bytes(self) -> int | None:
        """Bytes of live tensors on the device now."""
        if self.device != "cuda":
            return None
        import torch

        return int(torch.cuda.memory_allocated())

    def retries(self) -> int | None:
        """Times that the allocator ran out and emptied its cache, since the cell began."""
        now = self.allocator.retries()
        return None if now is None or self._retries is None else now - self._retries

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()

    # ------------------------------------------------------------ the host

    def look_at_host(self, pinned_bytes: int | None) -> None:
        """One sample of the proportional set, and what the method says it holds pinned now; the highest count."""
        pss, _ = proportional_set()
        self._pss = max((n for n in (self._pss, pss) if n is not None), default=None)
        self._pinned = max((n for n in (self._pinned, pinned_bytes) if n is not None), default=None)

    def host_peaks(self) -> dict[str, Any]:
        """The fields of a memory block about the host."""
        group, group_why = cgroup_peak()
        torch_pinned, torch_pinned_why = self.allocator.pinned_peak()
        return {
            "host_peak_bytes": self.host.peak_bytes(),
            "host_peak_bytes_why": self.host.why,
            "host_pss_peak_bytes": self._pss,
            "host_pss_why": None if self._pss is not None else proportional_set()[1] or "no sample was taken",
            "cgroup_peak_bytes": group,
            "cgroup_peak_why": group_why,
            "method_pinned_peak_bytes": self._pinned,
            "method_pinned_why": None if self._pinned is not None else "the method did not say",
            "torch_pinned_peak_bytes": torch_pinned,
            "torch_pinned_why": torch_pinned_why,
        }

    # ------------------------------------------------------------ the driver's view

    def look(self) -> None:
        """One more sample of the driver, while everything is still held."""
        if self._nvml.why is not None:
            return
        try:
            self._nvml.sample()
        except Exception as error:  # noqa: BLE001  NVML's errors share no base with anything, and none may stop a run
            self._nvml.why = f"NVML failed during the run: {error}"

    @property
    def foreign_why(self) -> str | None:
        """Who else was seen on the GPU since the cell began."""
        return self._nvml.foreign_why

    def nvml_peaks(self) -> dict[str, Any]:
        """The fields `nvml_*` of a memory block."""
        nvml = self._nvml
        known = nvml.why is None
        device_peak = nvml.device_peak_bytes if known else None
        return {
            "nvml_process_peak_bytes": nvml.process_peak_bytes if known else None,
            "nvml_process_why": nvml.process_why,
            "nvml_device_peak_bytes": device_peak,
            "nvml_device_why": nvml.why or (None if device_peak is not None else "no sample was taken"),
            "nvml_poll_s": nvml.poll_s if known else None,
        }

    def card_now(self) -> tuple[GpuState | None, str | None]:
        """Clocks, power and temperature at this moment, or None with the reason."""
        card, why = self._nvml.gpu_record()
        return (None, why) if card is None else (card.after, None)

    @property
    def name(self) -> str:
        """The card's name, or `cpu`; imports torch."""
        import torch

        return torch.cuda.get_device_name() if self.device == "cuda" else "cpu"

    def describe(self) -> DeviceRecord:
        """The device; imports torch."""
        import torch

        card, why = self._nvml.gpu_record()
        on_gpu = self.device == "cuda"
        major, minor = torch.cuda.get_device_capability() if on_gpu else (0, 0)
        return DeviceRecord(
            kind=self.device,
            name=self.name,
            total_bytes=int(torch.cuda.get_device_properties(0).total_memory) if on_gpu else None,
            total_bytes_why=None if on_gpu else ON_THE_CPU,
            compute_capability=f"{major}.{minor}" if on_gpu else None,
            torch_cuda=torch.version.cuda if on_gpu else None,
            alloc_conf=allocator_settings(),
            threads=torch.get_num_threads(),
            card=card,
            card_why=why,
            transfer=self.transfer,
            transfer_why=None if on_gpu else ON_THE_CPU,
        )


class StepMarks:
    """Marks between steps: CUDA events, read at the end of the window, or a monotonic counter."""

    def __init__(self, device: DeviceKind) -> None:
        self.clock: Literal["cuda events", "perf_counter"] = "cuda events" if device == "cuda" else "perf_counter"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """A step ends, the next one begins."""
        if self.clock == "perf_counter":
            self._marks.append(time.perf_counter())
            return
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> Sequence[float]:
        """Seconds from each mark to the next; waits for the device."""
        pairs = zip(self._marks[:-1], self._marks[1:], strict=True)
        if self.clock == "perf_counter":
            return [after - before for before, after in pairs]
        self._marks[-1].synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairs]
