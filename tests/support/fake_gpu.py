"""NVML, torch's CUDA module and its clock without a GPU: they answer what a test tells them to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

from harness.measuring.gpu import Device
from harness.measuring.meters import Meters

MIB = 2**20
A, B = Device(0, "GPU-aa", "Card A", "GPU-aa"), Device(1, "GPU-bb", "Card B", "GPU-bb")
PARTS = [Device(2, "MIG-1", "Card C, MIG", "GPU-cc"), Device(2, "MIG-2", "Card C, MIG", "GPU-cc")]


class NVMLError(Exception):
    """Base of NVML's own errors, as in `pynvml`."""


class NVMLError_NoPermission(NVMLError):  # noqa: N801, N818  NVML's spelling
    pass


class NVMLError_NotFound(NVMLError):  # noqa: N801, N818
    pass


class FakeNvml(ModuleType):
    """The calls of `pynvml` that the harness makes, for one machine.

    Args:
        used: bytes in use on the device, one a look; the last repeats.
        processes: (pid, bytes) of compute processes, one list a look, or an error to raise; the last repeats.
        reports_reserved_separately: whether the driver knows the second version of the memory query.
        cards: (uuid, name, UUIDs of its MIG parts or None where it is not in MIG mode).
    """

    NVML_GPU_VIRTUALIZATION_MODE_NONE, NVML_GPU_VIRTUALIZATION_MODE_PASSTHROUGH = 0, 1
    NVML_GPU_VIRTUALIZATION_MODE_VGPU, NVML_GPU_VIRTUALIZATION_MODE_HOST_VGPU = 2, 3
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVMLError_NoPermission = NVMLError_NoPermission
    NVMLError_NotFound = NVMLError_NotFound

    def __init__(
        self,
        *,
        used: list[int] | None = None,
        processes: list[Any] | None = None,
        reports_reserved_separately: bool = True,
        cards: tuple[tuple[str, str, tuple[str, ...] | None], ...] = (("GPU-a", "Card A", None),),
    ) -> None:
        super().__init__("pynvml")
        self.used, self.lists, self.cards = used or [0], processes or [[]], cards
        self.asked: list[Any] = []
        self.closed_cards: set[int] = set()
        self.throttling = [0]
        self.energy: dict[str, Iterator[int | Exception]] = {}
        """Readings of the energy counter in millijoules, by card; a card that is not named has none."""
        self.virtualization: int | None = None
        """None: not supported, as on most machines."""
        if reports_reserved_separately:
            self.nvmlMemory_v2 = 2

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlSystemGetDriverVersion(self) -> bytes:  # noqa: N802
        return b"580.10"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:  # noqa: N802
        return 13020

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        self.asked.append(index)
        if index in self.closed_cards:
            raise NVMLError_NoPermission("Insufficient Permissions")
        return self.cards[index][0] if index < len(self.cards) else "handle"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.asked.append(uuid)
        return uuid

    def nvmlDeviceGetUUID(self, handle: str) -> str:  # noqa: N802
        return handle

    def nvmlDeviceGetName(self, handle: str) -> bytes:  # noqa: N802
        return next((name.encode() for uuid, name, _ in self.cards if uuid == handle), b"Card")

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:  # noqa: N802
        parts = next((parts for uuid, _, parts in self.cards if uuid == handle), None)
        if parts is None:
            raise NVMLError("Not Supported")
        return [1, 1]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:  # noqa: N802
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, place: int) -> str:  # noqa: N802
        parts = next(parts for uuid, _, parts in self.cards if uuid == handle) or ()
        # places 0, 2, 4, ...: empty ones lie between
        if place % 2 or place // 2 >= len(parts):
            raise NVMLError_NotFound("Not Found")
        return parts[place // 2]

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, part: str) -> str:  # noqa: N802
        return next(uuid for uuid, _, parts in self.cards if part in (parts or ()))

    def nvmlDeviceGetMemoryInfo(self, handle: str, version: int | None = None) -> Any:  # noqa: N802
        if version is not None and not hasattr(self, "nvmlMemory_v2"):
            raise NVMLError("Function Not Found")
        self.asked.append(("memory", version))
        return SimpleNamespace(total=80_000 * MIB, used=self.used[0])

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:  # noqa: N802
        # memory is asked for first: a look is over when the processes were listed
        if len(self.used) > 1:
            self.used.pop(0)
        listed = self.lists.pop(0) if len(self.lists) > 1 else self.lists[0]
        if isinstance(listed, Exception):
            raise listed
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in listed]

    def nvmlDeviceGetClockInfo(self, board: str, kind: int) -> int:  # noqa: N802
        return {self.NVML_CLOCK_SM: 1980, self.NVML_CLOCK_MEM: 2619}[kind]

    def nvmlDeviceGetTotalEnergyConsumption(self, board: str) -> int:  # noqa: N802
        if board not in self.energy:
            raise NVMLError("Not Supported")
        reading = next(self.energy[board])
        if isinstance(reading, Exception):
            raise reading
        return reading

    def nvmlDeviceGetVirtualizationMode(self, board: str) -> int:  # noqa: N802
        if self.virtualization is None:
            raise NVMLError("Not Supported")
        return self.virtualization

    def nvmlDeviceGetTemperature(self, board: str, sensor: int) -> int:  # noqa: N802
        return 41

    def nvmlDeviceGetPowerUsage(self, board: str) -> int:  # noqa: N802
        return 71_250

    def nvmlDeviceGetEnforcedPowerLimit(self, board: str) -> int:  # noqa: N802
        return 700_000

    def nvmlDeviceGetCurrentClocksEventReasons(self, board: str) -> int:  # noqa: N802
        return self.throttling.pop(0) if len(self.throttling) > 1 else self.throttling[0]

    def nvmlDeviceGetCurrPcieLinkGeneration(self, board: str) -> int:  # noqa: N802
        return 1

    def nvmlDeviceGetCurrPcieLinkWidth(self, board: str) -> int:  # noqa: N802
        return 16

    def nvmlDeviceGetMaxPcieLinkGeneration(self, board: str) -> int:  # noqa: N802
        return 5

    def nvmlDeviceGetMaxPcieLinkWidth(self, board: str) -> int:  # noqa: N802
        raise NVMLError("Not Supported")


class FakeCuda(ModuleType):
    """`torch.cuda`: an allocator whose memory the test sets, and a device clock that work moves on."""

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        self.now = self.peak = self.reserved = self.reserved_peak = 0
        self.retries = 0
        self.resets = 0
        self.streams: list[FakeStream] = []
        self.current = self.Stream()
        self.waited = 0

    def use(self, nbytes: int) -> None:
        """From here on `nbytes` are allocated."""
        self.now = nbytes
        self.peak = max(self.peak, nbytes)
        self.reserved = max(self.reserved, nbytes)
        self.reserved_peak = max(self.reserved_peak, self.reserved)

    def memory_stats_as_nested_dict(self) -> dict[str, Any]:
        return {
            "allocated_bytes": {"all": {"current": self.now, "peak": self.peak}},
            "reserved_bytes": {"all": {"current": self.reserved, "peak": self.reserved_peak}},
            "num_alloc_retries": self.retries,
        }

    def reset_peak_memory_stats(self) -> None:
        self.resets += 1
        self.peak, self.reserved_peak = self.now, self.reserved

    def host_memory_stats(self) -> dict[str, int]:
        return {"allocated_bytes.peak": 4096}

    def memory_allocated(self) -> int:
        return self.now

    def get_device_name(self) -> str:
        return "Card A"

    def empty_cache(self) -> None:
        self.reserved = self.now

    # ------------------------------------------------------------ time

    def Event(self, *, enable_timing: bool) -> FakeEvent:  # noqa: N802
        return FakeEvent(self)

    def Stream(self) -> FakeStream:  # noqa: N802
        self.streams.append(FakeStream())
        return self.streams[-1]

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def work(self, milliseconds: float) -> None:
        """Enqueue work on the current stream."""
        self.current.at += milliseconds

    def synchronize(self) -> None:
        """Everything is done, on all streams."""
        end = max(stream.at for stream in self.streams)
        for stream in self.streams:
            stream.at = end


class FakeStream:
    """A queue, known by the time at which it is empty (ms)."""

    def __init__(self) -> None:
        self.at = 0.0

    def wait_event(self, event: FakeEvent) -> None:
        self.at = max(self.at, event.at)


class FakeEvent:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.at = cuda, 0.0

    def record(self) -> None:
        self.at = self.cuda.current.at

    def synchronize(self) -> None:
        self.cuda.waited += 1

    def elapsed_time(self, end: FakeEvent) -> float:
        return end.at - self.at


def gpu_meters(cuda: FakeCuda, nvml: FakeNvml | None = None) -> Meters:
    return Meters("cuda", cuda=cuda, nvml=nvml if nvml is not None else FakeNvml())
