"""Peak memory by phase: host from the kernel's high-water mark, device from torch's allocator and from NVML.

One interface whatever the machine has. A meter that cannot read answers None for every phase and says why once.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from harness.record import Memory

POLL_S = 0.1


class Meter(Protocol):
    """A peak that can be restarted. `why` is None while it can be read."""

    why: str | None

    def restart(self) -> None:
        """Forget the peak so far."""

    def peak_bytes(self) -> int | None:
        """Highest value since the last restart."""


class HostMeter:
    """Peak resident set of this process: Linux keeps a high-water mark that can be set back exactly."""

    def __init__(self, proc: Path = Path("/proc/self")) -> None:
        self._status, self._reset = proc / "status", proc / "clear_refs"
        self.why: str | None = None
        try:
            self.restart()
            self._read()
        except (OSError, LookupError) as error:
            self.why = f"the kernel's high-water mark cannot be reset here ({type(error).__name__})"

    def restart(self) -> None:
        """Set the high-water mark back to the present resident set."""
        if self.why is None:
            self._reset.write_text("5")

    def peak_bytes(self) -> int | None:
        """Peak resident set since the last restart."""
        return self._read() if self.why is None else None

    def _read(self) -> int:
        for line in self._status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        raise LookupError("VmHWM")


class TorchMeter:
    """Peak of torch's CUDA allocator, `allocated` or `reserved`."""

    def __init__(self, kind: str, device: str) -> None:
        import torch

        self._torch, self._kind = torch, kind
        self.why = None if device == "cuda" else "the run was on the CPU"

    def restart(self) -> None:
        """Reset the allocator's peaks."""
        if self.why is None:
            self._torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int | None:
        """Peak since the last restart."""
        if self.why is not None:
            return None
        return int(getattr(self._torch.cuda, f"max_memory_{self._kind}")())


class NvmlMeter:
    """Device and process memory as NVML sees it, sampled by a thread; one peak for the whole run."""

    def __init__(self, device: str, nvml: ModuleType | None = None) -> None:
        self.process_peak_bytes: int | None = None
        self.device_peak_bytes: int | None = None
        self.why: str | None = None
        self._stop = threading.Event()
        if device != "cuda":
            self.why = "the run was on the CPU"
            return
        try:
            self._nvml: Any = nvml if nvml is not None else importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
            self._handle = (
                self._nvml.nvmlDeviceGetHandleByUUID(visible)
                if visible.startswith("GPU-")
                else self._nvml.nvmlDeviceGetHandleByIndex(int(visible or 0))
            )
            self.sample()
        except Exception as error:  # noqa: BLE001  NVML's errors share no base with anything, and none may stop a run
            self.why = f"NVML: {error}"
            return
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def sample(self) -> None:
        """Read once and raise the peaks."""
        used = int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        self.device_peak_bytes = max(used, self.device_peak_bytes or 0)
        mine = [p for p in self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle) if p.pid == os.getpid()]
        # inside a container the host's process ids do not match: that is null, not 0
        if mine and mine[0].usedGpuMemory is not None:
            self.process_peak_bytes = max(int(mine[0].usedGpuMemory), self.process_peak_bytes or 0)

    def close(self) -> None:
        """Stop sampling."""
        self._stop.set()

    def _poll(self) -> None:
        while not self._stop.wait(POLL_S):
            try:
                self.sample()
            except Exception as error:  # noqa: BLE001  as above; a peak of half a run is no peak
                self.process_peak_bytes = self.device_peak_bytes = None
                self.why = f"NVML failed during the run: {error}"
                return


class MemoryMeters:
    """All meters of a run; `phase` brackets what is to be told apart."""

    def __init__(self, device: str) -> None:
        self._host = HostMeter()
        self._allocated, self._reserved = TorchMeter("allocated", device), TorchMeter("reserved", device)
        self._nvml = NvmlMeter(device)
        self._peaks: dict[str, dict[str, int | None]] = {"host": {}, "allocated": {}, "reserved": {}}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Peaks inside the block go under `name`; a phase entered twice keeps its higher peak."""
        meters: dict[str, Meter] = {"host": self._host, "allocated": self._allocated, "reserved": self._reserved}
        for meter in meters.values():
            meter.restart()
        try:
            yield
        finally:
            for key, meter in meters.items():
                peak, old = meter.peak_bytes(), self._peaks[key].get(name)
                self._peaks[key][name] = peak if old is None or peak is None else max(peak, old)

    def record(self, *, state_peak_bytes: int | None) -> Memory:
        """Stop sampling and put everything in one record."""
        self._nvml.close()
        nvml_why = self._nvml.why
        if nvml_why is None and self._nvml.process_peak_bytes is None:
            nvml_why = "NVML lists no process with this id (a container?): device memory only"
        return Memory(
            host_peak_bytes=self._peaks["host"],
            host_peak_bytes_why=self._host.why,
            device_allocated_peak_bytes=self._peaks["allocated"],
            device_reserved_peak_bytes=self._peaks["reserved"],
            device_why=self._allocated.why,
            nvml_process_peak_bytes=self._nvml.process_peak_bytes,
            nvml_device_peak_bytes=self._nvml.device_peak_bytes,
            nvml_why=nvml_why,
            state_peak_bytes=state_peak_bytes,
        )
