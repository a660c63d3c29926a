"""What the driver says of this process and of its neighbours, and why where it says nothing."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import pytest
import torch
from fake_gpu import MIB, FakeNvml, NVMLError, NVMLError_NoPermission
from harness.measuring.nvml import FOREIGN_BYTES, FOREIGN_WITH_RESERVED_BYTES, NvmlMeter

ME = os.getpid()
STRANGER = 4711
NEVER = 3600.0
"""Samples are taken by hand."""


@pytest.fixture(autouse=True)
def _one_plain_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def metered(nvml: FakeNvml, *, looks: int = 1) -> NvmlMeter:
    """A meter that looked `looks` times during the run and once at its end."""
    meter = NvmlMeter("cuda", nvml, poll_s=NEVER)
    for _ in range(looks):
        meter.sample()
    meter.close()
    return meter


def test_this_process_is_found_and_keeps_its_highest_sample() -> None:
    for used, mine in (([0, 500, 700], [300, 400]), ([0, 700, 500], [400, 300])):
        meter = metered(FakeNvml(used=[*used], processes=[[], *([(ME, m)] for m in mine)]), looks=2)
        assert (meter.process_peak_bytes, meter.device_peak_bytes, meter.delta_peak_bytes) == (400, 700, 700)
        assert (meter.why, meter.process_why, meter.delta_why, meter.foreign_why) == (None, None, None, None)
        assert meter.source == "process"


def test_a_thread_samples_until_it_is_closed() -> None:
    nvml = FakeNvml(used=[0, 1, 2, 3, 4], processes=[[], *([(ME, n)] for n in (10, 20, 30, 40))])
    meter = NvmlMeter("cuda", nvml, poll_s=0.001)
    thread = meter._thread
    deadline = time.monotonic() + 10
    while meter.device_peak_bytes != 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    meter.close()
    assert (meter.device_peak_bytes, meter.process_peak_bytes) == (4, 40)
    assert thread is not None
    assert not thread.is_alive()


def test_samples_outside_of_measured_phases_raise_no_peak() -> None:
    nvml = FakeNvml(used=[0, 900, 300], processes=[[], [(ME, 800)], [(ME, 200)]])
    meter = NvmlMeter("cuda", nvml, poll_s=NEVER)
    meter.counting = False
    meter.sample()
    meter.counting = True
    meter.close()
    assert (meter.device_peak_bytes, meter.process_peak_bytes) == (300, 200)


# ---------------------------------------------------------------- no figure, and why


def test_in_a_container_the_device_delta_stands_for_the_process() -> None:
    meter = metered(FakeNvml(used=[30 * MIB, 930 * MIB], processes=[[], [(99_001, 850 * MIB)]]))
    assert meter.process_peak_bytes is None
    assert meter.process_why == "NVML lists no process with this id (a container?)"
    assert (meter.delta_peak_bytes, meter.source) == (900 * MIB, "device delta")
    assert meter.foreign_why is None, "the one that is listed is this process under the host's number"


def test_a_container_that_hides_all_processes_is_the_same() -> None:
    meter = metered(FakeNvml(used=[0, 900], processes=[[]]))
    assert meter.process_why == "NVML lists no process with this id (a container?)"
    assert (meter.delta_peak_bytes, meter.source, meter.foreign_why) == (900, "device delta", None)


def test_a_list_that_may_not_be_read_is_a_reason_and_the_delta_stands() -> None:
    meter = metered(FakeNvml(used=[0, 900], processes=[NVMLError_NoPermission("Insufficient Permissions")]))
    assert meter.process_why == "NVML gives no list of processes (Insufficient Permissions)"
    assert (meter.process_peak_bytes, meter.device_peak_bytes, meter.delta_peak_bytes) == (None, 900, 900)
    assert meter.source == "device delta"


def test_under_wsl_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "5.15.90.1-microsoft-standard-WSL2")
    unlisted = metered(FakeNvml(used=[0, 900], processes=[NVMLError("Not Supported")]))
    assert unlisted.process_why == "NVML gives no list of processes (Not Supported, under WSL)"
    without_memory = metered(FakeNvml(used=[0, 900], processes=[[], [(ME, None)]]))
    assert without_memory.process_why == "NVML lists this process without its memory, under WSL"
    assert without_memory.process_peak_bytes is None, "null, not 0"
    assert without_memory.source == "device delta"


MIG = (("GPU-a", "Card A", ("MIG-1", "MIG-2")),)


def test_on_a_mig_device_memory_is_the_parts_and_the_reason_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-2")
    nvml = FakeNvml(used=[0, 900], processes=[NVMLError("Not Supported")], cards=MIG)
    meter = metered(nvml)
    assert nvml.asked[0] == "MIG-2"
    assert meter.process_why == "NVML gives no list of processes (Not Supported, on a MIG device)"
    assert (meter.delta_peak_bytes, meter.source) == (900, "device delta")
    record, _ = meter.gpu_record()
    assert record is not None
    assert (record.mig, record.uuid, record.name) == (True, "MIG-2", "Card A")


def test_a_card_in_mig_mode_without_a_part_named_gives_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    meter = metered(FakeNvml(used=[700], processes=[[(STRANGER, 600)]], cards=MIG), looks=0)
    assert (meter.device_peak_bytes, meter.process_peak_bytes, meter.delta_peak_bytes) == (None, None, None)
    assert str(meter.why).startswith("CUDA_VISIBLE_DEVICES names a GPU in MIG mode, not one of its MIG devices")
    assert meter.process_why == meter.delta_why == meter.why
    assert meter.foreign_why is None, "who is listed may be on another part"


def test_an_nvml_that_does_not_start_is_a_reason_and_no_error() -> None:
    nvml = FakeNvml()

    def fails() -> None:
        raise NVMLError("Driver Not Loaded")

    nvml.nvmlInit = fails  # type: ignore[method-assign]
    meter = metered(nvml, looks=0)
    assert meter.why == meter.process_why == meter.delta_why == "NVML: Driver Not Loaded"
    assert (meter.process_peak_bytes, meter.device_peak_bytes, meter.source) == (None, None, None)
    assert meter.gpu_record() == (None, "NVML: Driver Not Loaded")


def test_without_the_package_there_is_a_reason_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    meter = NvmlMeter("cuda")
    assert str(meter.why).startswith("NVML: ")
    assert "pynvml" in str(meter.why)


def test_nvml_failing_in_mid_run_voids_the_peaks_and_says_so() -> None:
    nvml = FakeNvml(used=[0, 5], processes=[[], [(ME, 4)]])
    meter = NvmlMeter("cuda", nvml, poll_s=NEVER)
    meter.sample()
    assert meter.device_peak_bytes == 5

    def lost(handle: str, version: int | None = None) -> Any:
        raise NVMLError("GPU is lost")

    nvml.nvmlDeviceGetMemoryInfo = lost  # type: ignore[method-assign]
    meter.close()
    assert (meter.device_peak_bytes, meter.process_peak_bytes, meter.delta_peak_bytes) == (None, None, None)
    assert meter.why == meter.process_why == "NVML failed during the run: GPU is lost"


def test_a_card_that_this_process_had_used_before_has_no_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    meter = metered(FakeNvml(used=[900], processes=[[(ME, 800)]]))
    assert (meter.delta_peak_bytes, meter.process_peak_bytes) == (None, 800)
    assert meter.delta_why == "this process had used the GPU before it was first looked at"
    assert meter.foreign_why is None


@pytest.mark.parametrize(
    ("visible", "asked"), [(None, 0), ("", 0), ("3", 3), ("2,0", 2), ("GPU-abc,GPU-def", "GPU-abc")]
)
def test_nvml_looks_at_the_device_that_torch_sees_first(
    visible: str | None, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    nvml = FakeNvml()
    metered(nvml, looks=0)
    assert nvml.asked[0] == asked


def test_what_the_driver_reserves_for_itself_is_left_out_where_it_can_be_told() -> None:
    for apart, version in ((True, 2), (False, None)):
        nvml = FakeNvml(reports_reserved_separately=apart)
        metered(nvml)
        assert nvml.asked[-1] == ("memory", version)


# ---------------------------------------------------------------- neighbours


def test_a_process_that_was_there_before_is_foreign_under_any_number() -> None:
    meter = metered(FakeNvml(used=[0, 900], processes=[[(STRANGER, 50)], [(STRANGER, 50), (ME, 800)]]))
    assert meter.foreign_why == "1 compute process(es) were on the GPU before the run began (pid 4711)"
    assert meter.delta_peak_bytes is None
    assert meter.delta_why == meter.foreign_why


def test_a_process_that_comes_later_is_foreign() -> None:
    looks = [[], [(ME, 800)], [(ME, 800), (STRANGER, 50)], [(ME, 800)]]
    meter = metered(FakeNvml(used=[0, 900], processes=looks), looks=3)
    assert meter.foreign_why == "another compute process was on the GPU during the run (pid 4711)"


def test_a_neighbour_counts_while_nothing_else_is_measured() -> None:
    meter = NvmlMeter("cuda", FakeNvml(processes=[[], [(ME, 8), (STRANGER, 5)]]), poll_s=NEVER)
    meter.counting = False
    meter.sample()
    assert meter.foreign_why is not None


def test_of_two_processes_in_a_container_one_is_foreign() -> None:
    meter = metered(FakeNvml(used=[0, 900], processes=[[], [(99_001, 800), (99_002, 50)]]))
    assert meter.foreign_why == "another compute process was on the GPU during the run (pid 99002)"


@pytest.mark.parametrize(("apart", "limit"), [(True, FOREIGN_BYTES), (False, FOREIGN_WITH_RESERVED_BYTES)])
def test_memory_in_use_before_by_nobody_listed_is_a_neighbour_where_numbers_do_not_match(
    apart: bool, limit: int
) -> None:
    def meter(before: int, listed: list[Any]) -> NvmlMeter:
        return metered(FakeNvml(used=[before, before + 900], processes=[[], listed], reports_reserved_separately=apart))

    why = f"{limit + 1:,} bytes of the GPU were in use before the run's first allocation, by nobody NVML lists"
    assert meter(limit + 1, []).foreign_why == why
    assert meter(limit, []).foreign_why is None
    assert meter(limit + 1, [(ME, 800)]).foreign_why is None, "the list can be trusted: a desktop, say"


# ---------------------------------------------------------------- the card


def test_the_card_is_described_before_and_after_and_its_throttling_throughout() -> None:
    nvml = FakeNvml(processes=[[(ME, 1)]])
    nvml.throttling = [0x1, 0x4, 0x40, 0x1]
    meter = NvmlMeter("cuda", nvml, poll_s=0.001)
    deadline = time.monotonic() + 10
    while len(nvml.throttling) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    meter.close()
    record, why = meter.gpu_record()
    assert why is None
    assert record is not None
    assert (record.name, record.uuid, record.mig) == ("Card A", "GPU-a", False)
    assert (record.driver, record.driver_cuda, record.total_bytes) == ("580.10", "13.2", 80_000 * MIB)
    assert record.before.throttle_reasons == ["idle"]
    assert record.throttle_reasons_during is not None
    assert {"software power cap", "hardware thermal slowdown"} <= set(record.throttle_reasons_during)
    assert (record.after.sm_clock_mhz, record.after.memory_clock_mhz, record.after.temperature_c) == (1980, 2619, 41)
    assert (record.after.power_w, record.after.power_limit_w) == (71.25, 700.0)
    assert (record.after.pcie_generation, record.after.pcie_lanes, record.pcie_max_generation) == (1, 16, 5)
    assert record.pcie_max_lanes is None
    assert record.unread_why["pcie_max_lanes"] == "NVML: Not Supported"


def test_a_figure_that_a_card_does_not_give_is_null_with_the_drivers_words() -> None:
    nvml = FakeNvml()

    def refuses(board: str) -> int:
        raise NVMLError("Not Supported")

    nvml.nvmlDeviceGetPowerUsage = refuses  # type: ignore[method-assign]
    nvml.nvmlDeviceGetCurrentClocksEventReasons = refuses  # type: ignore[method-assign]
    record, _ = metered(nvml).gpu_record()
    assert record is not None
    assert record.before.power_w is None
    assert record.before.unread_why["power_w"] == "NVML: Not Supported"
    assert record.throttle_reasons_during is None
    assert record.unread_why["throttle_reasons_during"] == "NVML: Not Supported"
    assert record.before.sm_clock_mhz == 1980
