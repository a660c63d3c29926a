"""Peaks by phase, NVML, and a reason where there is no number."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from harness.measuring import meters
from harness.measuring.meters import HostMeter, MemoryMeters, NvmlMeter, TorchMeter

MIB = 2**20


def test_a_host_peak_is_that_of_its_own_phase() -> None:
    meter = HostMeter()
    if meter.why is not None:
        pytest.skip(meter.why)
    size = 64 * MIB
    meter.restart()
    before = meter.peak_bytes()
    block = b"x" * size
    assert len(block) == size
    del block
    during = meter.peak_bytes()
    meter.restart()
    after = meter.peak_bytes()
    assert before is not None
    assert during is not None
    assert after is not None
    # a page or two may go back to the system meanwhile
    assert during - before >= size - MIB
    assert abs(after - before) < 8 * MIB


def test_a_phase_keeps_its_own_peak_and_the_higher_of_two_visits() -> None:
    meters = MemoryMeters("cpu")
    if HostMeter().why is not None:
        pytest.skip(str(HostMeter().why))
    with meters.phase("small"):
        pass
    with meters.phase("large"):
        block = b"x" * (64 * MIB)
        assert block
        del block
    with meters.phase("small"):
        pass
    with meters.phase("large"):
        pass
    peaks = meters.record(state_peak_bytes=None).host_peak_bytes
    assert peaks["large"] is not None
    assert peaks["small"] is not None
    assert peaks["large"] - peaks["small"] >= 60 * MIB


def test_a_phase_that_fails_is_measured_too() -> None:
    meters = MemoryMeters("cpu")
    with pytest.raises(MemoryError), meters.phase("load"):
        raise MemoryError
    assert "load" in meters.record(state_peak_bytes=None).host_peak_bytes


def test_without_a_writable_proc_the_host_peak_is_null_with_a_reason(tmp_path: Path) -> None:
    gone = HostMeter(tmp_path / "nowhere")
    assert gone.peak_bytes() is None
    assert gone.why == "the kernel's high-water mark cannot be reset here (FileNotFoundError)"
    gone.restart()

    # a kernel without the high-water mark
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t100 kB\n")
    without = HostMeter(tmp_path)
    assert without.peak_bytes() is None
    assert without.why == "the kernel's high-water mark cannot be reset here (LookupError)"

    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t  2048 kB\n")
    sound = HostMeter(tmp_path)
    assert (sound.why, sound.peak_bytes()) == (None, 2 * MIB)
    assert (tmp_path / "clear_refs").read_text() == "5"


def test_on_the_cpu_every_device_figure_is_null_with_a_reason() -> None:
    meters = MemoryMeters("cpu")
    with meters.phase("steady"):
        pass
    record = meters.record(state_peak_bytes=12)
    assert record.device_allocated_peak_bytes == {"steady": None}
    assert record.device_reserved_peak_bytes == {"steady": None}
    assert record.device_why == "the run was on the CPU"
    assert (record.nvml_process_peak_bytes, record.nvml_device_peak_bytes) == (None, None)
    assert record.nvml_why == "the run was on the CPU"
    assert record.state_peak_bytes == 12
    assert TorchMeter("allocated", "cpu").peak_bytes() is None


class FakeNvml(ModuleType):
    """The five calls of NVML that the meter makes, answering from lists; the last answer repeats."""

    def __init__(self, *, device: list[int], process: list[int | None], pid: int | None = None) -> None:
        super().__init__("pynvml")
        self.device, self.process = device, process
        self.pid = os.getpid() if pid is None else pid
        self.asked: list[Any] = []

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        self.asked.append(index)
        return "handle"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.asked.append(uuid)
        return "handle"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        return SimpleNamespace(used=self.device.pop(0) if len(self.device) > 1 else self.device[0])

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:  # noqa: N802
        used = self.process.pop(0) if len(self.process) > 1 else self.process[0]
        return [SimpleNamespace(pid=1, usedGpuMemory=999), SimpleNamespace(pid=self.pid, usedGpuMemory=used)]


def nvml_meter(fake: FakeNvml, *, samples: int = 0) -> NvmlMeter:
    meter = NvmlMeter("cuda", fake)
    meter.close()
    for _ in range(samples):
        meter.sample()
    return meter


def test_nvml_finds_this_process_among_others_and_keeps_the_highest_of_two_samples() -> None:
    rising = nvml_meter(FakeNvml(device=[500, 700], process=[300, 400]), samples=1)
    falling = nvml_meter(FakeNvml(device=[700, 500], process=[400, 300]), samples=1)
    for meter in (rising, falling):
        assert (meter.why, meter.process_peak_bytes, meter.device_peak_bytes) == (None, 400, 700)


def test_nvml_keeps_sampling_until_it_is_closed() -> None:
    fake = FakeNvml(device=[1, 2, 3, 4], process=[10, 20, 30, 40])
    meter = NvmlMeter("cuda", fake)
    deadline = time.monotonic() + 10
    while meter.device_peak_bytes != 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    meter.close()
    assert (meter.device_peak_bytes, meter.process_peak_bytes) == (4, 40)
    meter._thread.join(timeout=10)
    assert not meter._thread.is_alive()


def test_a_process_that_nvml_does_not_list_is_null_with_a_reason_and_the_device_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for fake in (FakeNvml(device=[500], process=[300], pid=424242), FakeNvml(device=[500], process=[None])):
        meter = nvml_meter(fake)
        assert (meter.process_peak_bytes, meter.device_peak_bytes) == (None, 500)
        meters = MemoryMeters("cpu")
        monkeypatch.setattr(meters, "_nvml", meter)
        record = meters.record(state_peak_bytes=None)
        assert record.nvml_process_peak_bytes is None
        assert record.nvml_device_peak_bytes == 500
        assert record.nvml_why == "NVML lists no process with this id (a container?): device memory only"


def test_an_nvml_that_does_not_start_is_a_reason_and_no_error() -> None:
    fake = FakeNvml(device=[500], process=[300])

    def fails() -> None:
        raise RuntimeError("Driver Not Loaded")

    fake.nvmlInit = fails  # type: ignore[method-assign]
    meter = NvmlMeter("cuda", fake)
    assert meter.why == "NVML: Driver Not Loaded"
    assert (meter.process_peak_bytes, meter.device_peak_bytes) == (None, None)
    meter.close()


@pytest.mark.parametrize(
    ("visible", "asked"), [(None, 0), ("", 0), ("3", 3), ("2,0", 2), ("GPU-abc,GPU-def", "GPU-abc")]
)
def test_nvml_looks_at_the_device_that_torch_sees_first(
    visible: str | None, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    fake = FakeNvml(device=[1], process=[1])
    nvml_meter(fake)
    assert fake.asked == [asked]


def test_nvml_failing_in_mid_run_voids_the_peaks_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "POLL_S", 0.001)
    calls: list[int] = []

    def memory(_: object) -> object:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("GPU is lost")
        return SimpleNamespace(used=5)

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda _: "device",
        nvmlDeviceGetMemoryInfo=memory,
        nvmlDeviceGetComputeRunningProcesses=lambda _: [],
    )
    meter = NvmlMeter("cuda", nvml)  # type: ignore[arg-type]
    meter._thread.join(timeout=10)
    assert meter.device_peak_bytes is None
    assert meter.why == "NVML failed during the run: GPU is lost"
