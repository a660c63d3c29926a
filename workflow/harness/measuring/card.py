"""One GPU as NVML describes it: memory, processes, clocks, power and link. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

from harness.records.measured import GpuRecord, GpuState

T = TypeVar("T")

THROTTLE_REASONS = {
    0x1: "idle", 0x2: "application clocks", 0x4: "software power cap", 0x8: "hardware slowdown", 0x10: "sync boost",
    0x20: "software thermal slowdown", 0x40: "hardware thermal slowdown", 0x80: "hardware power brake",
    0x100: "display clocks",
}  # fmt: skip
"""Bits of nvmlClocksEventReasons, in nvml.h."""


class Card:
    """The GPU, or the MIG part of one, that torch sees first: the first entry of CUDA_VISIBLE_DEVICES.

    Clocks, power, energy and link are those of the whole board; memory and processes are those of the MIG part.

    Args:
        nvml: `pynvml`, or a stand-in for it.

    Raises:
        Exception: whatever NVML raises where there is no driver or no such device; its errors share no base.
    """

    def __init__(self, nvml: ModuleType) -> None:
        self._nvml: Any = nvml
        nvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
        self.mig = visible.startswith("MIG-")
        if visible.startswith(("GPU-", "MIG-")):
            self._handle = self._nvml.nvmlDeviceGetHandleByUUID(visible)
        else:
            self._handle = self._nvml.nvmlDeviceGetHandleByIndex(int(visible or 0))
        self._board = (
            self._nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self._handle) if self.mig else self._handle
        )
        self.mig_part_unknown = not self.mig and in_mig_mode(nvml, self._handle)
        """In MIG mode, but no part was named: CUDA takes the first one, and this class cannot tell which that is."""
        self.part_why = self._part_why()
        """Why figures of the whole board say nothing of this process; None where it has all of the board."""
        self.reports_reserved_separately = self._has_second_version()
        """Whether the driver reports used memory apart from the memory it reserves for itself."""
        self._throttling: int | None = None
        self._throttling_why: str | None = None
        self._before = self.state()

    def _part_why(self) -> str | None:
        if self.mig or self.mig_part_unknown:
            return "the GPU is partitioned (MIG), and its energy counter is of the whole card"
        try:
            mode = self._nvml.nvmlDeviceGetVirtualizationMode(self._board)
        except Exception:  # noqa: BLE001  not supported where nothing is virtual, an attribute missing in old packages
            return None
        whole = (self._nvml.NVML_GPU_VIRTUALIZATION_MODE_NONE, self._nvml.NVML_GPU_VIRTUALIZATION_MODE_PASSTHROUGH)
        return None if mode in whole else "the GPU is partitioned (vGPU), and its energy counter is of the whole card"

    def _has_second_version(self) -> bool:
        try:
            self._nvml.nvmlDeviceGetMemoryInfo(self._handle, version=self._nvml.nvmlMemory_v2)
        except Exception:  # noqa: BLE001  an old driver or an old nvidia-ml-py: any error means the first version
            return False
        return True

    def used_bytes(self) -> int:
        """Memory in use on the device, by anybody."""
        if self.reports_reserved_separately:
            return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle, version=self._nvml.nvmlMemory_v2).used)
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)

    def energy_mj(self) -> int:
        """Millijoules that the board has used since its driver was loaded, idle power included.

        Raises:
            Exception: NVML's; boards older than Volta have no such counter.
        """
        return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._board))

    def processes(self) -> list[Any]:
        """Compute processes on the device, each with `pid` and `usedGpuMemory` (bytes or None)."""
        return list(self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle))

    def note_throttling(self) -> None:
        """Record the reasons for which clocks are throttled at this moment."""
        if self._throttling_why is None:
            try:
                self._throttling = (self._throttling or 0) | self._throttle_bits()
            except Exception as error:  # noqa: BLE001  as above; a figure that cannot be read stops nothing
                self._throttling, self._throttling_why = None, f"NVML: {error}"

    def _throttle_bits(self) -> int:
        new = getattr(self._nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        return int((new or self._nvml.nvmlDeviceGetCurrentClocksThrottleReasons)(self._board))

    def state(self) -> GpuState:
        """Clocks, power and link now."""
        nvml, board = self._nvml, self._board
        read = _Reader()
        return GpuState(
            sm_clock_mhz=read("sm_clock_mhz", lambda: int(nvml.nvmlDeviceGetClockInfo(board, nvml.NVML_CLOCK_SM))),
            memory_clock_mhz=read(
                "memory_clock_mhz", lambda: int(nvml.nvmlDeviceGetClockInfo(board, nvml.NVML_CLOCK_MEM))
            ),
            temperature_c=read(
                "temperature_c", lambda: int(nvml.nvmlDeviceGetTemperature(board, nvml.NVML_TEMPERATURE_GPU))
            ),
            power_w=read("power_w", lambda: nvml.nvmlDeviceGetPowerUsage(board) / 1000),
            power_limit_w=read("power_limit_w", lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(board) / 1000),
            throttle_reasons=read("throttle_reasons", lambda: _words(self._throttle_bits())),
            pcie_generation=read("pcie_generation", lambda: int(nvml.nvmlDeviceGetCurrPcieLinkGeneration(board))),
            pcie_lanes=read("pcie_lanes", lambda: int(nvml.nvmlDeviceGetCurrPcieLinkWidth(board))),
            unread_why=read.why,
        )

    def record(self) -> GpuRecord:
        """The card's description, its state when this object was made, and its state now."""
        nvml, board = self._nvml, self._board
        read = _Reader()
        during = None if self._throttling is None else _words(self._throttling)
        if during is None:
            read.why["throttle_reasons_during"] = self._throttling_why or "no sample was taken"
        return GpuRecord(
            name=read("name", lambda: text_of(nvml.nvmlDeviceGetName(board))),
            uuid=read("uuid", lambda: text_of(nvml.nvmlDeviceGetUUID(self._handle))),
            mig=self.mig or self.mig_part_unknown,
            total_bytes=read("total_bytes", lambda: int(nvml.nvmlDeviceGetMemoryInfo(self._handle).total)),
            driver=read("driver", lambda: text_of(nvml.nvmlSystemGetDriverVersion())),
            driver_cuda=read("driver_cuda", lambda: _cuda_version(nvml.nvmlSystemGetCudaDriverVersion_v2())),
            torch_cuda=read("torch_cuda", _torch_cuda),
            pcie_max_generation=read(
                "pcie_max_generation", lambda: int(nvml.nvmlDeviceGetMaxPcieLinkGeneration(board))
            ),
            pcie_max_lanes=read("pcie_max_lanes", lambda: int(nvml.nvmlDeviceGetMaxPcieLinkWidth(board))),
            unread_why=read.why,
            before=self._before,
            after=self.state(),
            throttle_reasons_during=during,
        )


class _Reader:
    """Reads figures one by one; a figure that cannot be read is None, and the reason is kept."""

    def __init__(self) -> None:
        self.why: dict[str, str] = {}

    def __call__(self, key: str, ask: Callable[[], T]) -> T | None:
        try:
            return ask()
        except Exception as error:  # noqa: BLE001  NVML's errors share no base, and none may stop a run
            self.why[key] = f"NVML: {error}"
            return None


def cuda_is_initialised() -> bool:
    """Whether this process already holds a CUDA context; asks torch only if it has been imported."""
    torch = sys.modules.get("torch")
    return torch is not None and bool(torch.cuda.is_initialized())


def in_mig_mode(nvml: Any, handle: Any) -> bool:
    """Whether a card is split into MIG devices; False for a card that does not support MIG."""
    try:
        return bool(nvml.nvmlDeviceGetMigMode(handle)[0])
    except Exception:  # noqa: BLE001  "not supported" on most cards, an attribute missing in old packages
        return False


def text_of(value: str | bytes) -> str:
    """An answer of NVML as text: older packages return bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _words(bits: int) -> list[str]:
    known = [word for bit, word in THROTTLE_REASONS.items() if bits & bit]
    rest = bits & ~sum(THROTTLE_REASONS)
    return [*known, f"{rest:#x}"] if rest else known


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _torch_cuda() -> str:
    version: str | None = sys.modules["torch"].version.cuda
    if version is None:
        raise LookupError("this torch was built without CUDA")
    return version
