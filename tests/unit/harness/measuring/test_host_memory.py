"""Memory of the host: peaks by phase, what the process and its control group say; or a reason for no number."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_gpu import MIB
from harness.measuring.host import HostMeter, cgroup_peak, proportional_set
from harness.measuring.meters import Meters


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
    meters = Meters("cpu")
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
    meters = Meters("cpu")
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


def test_the_proportional_set_is_read_from_the_kernel_or_null_with_a_reason(tmp_path: Path) -> None:
    rollup = "55a7 ---p [rollup]\nRss:  1764 kB\nPss:   297 kB\nPss_Dirty: 1 kB\nAnonymous:  120 kB\n"
    (tmp_path / "smaps_rollup").write_text(rollup)
    assert proportional_set(tmp_path) == (297 * 1024, None)
    # 100 of the 120 kB are shared with the process that this one was forked from
    (tmp_path / "smaps_rollup").write_text(rollup + "Pss_Anon:  70 kB\nPss_File:  227 kB\n")
    assert proportional_set(tmp_path) == ((297 - 70 + 120) * 1024, None)
    assert proportional_set(tmp_path / "no") == (None, "the kernel gives no smaps_rollup here (FileNotFoundError)")


@pytest.mark.parametrize(
    ("membership", "file"),
    [
        ("0::/user.slice/job-7", "user.slice/job-7/memory.peak"),
        ("0::/of/the/host", "memory.peak"),  # a container: the path is the host's, the mount its own group
        ("9:name=systemd:/\n4:cpuacct,memory:/job\n0::/", "memory/job/memory.max_usage_in_bytes"),
        ("4:memory:/of/the/host", "memory/memory.max_usage_in_bytes"),
    ],
)
def test_the_control_groups_peak_is_found_in_both_versions(membership: str, file: str, tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text(membership + "\n")
    (tmp_path / "root" / file).parent.mkdir(parents=True)
    (tmp_path / "root" / file).write_text("123456\n")
    assert cgroup_peak(tmp_path, tmp_path / "root") == (123456, None)


def test_a_control_group_without_a_peak_is_null_with_a_reason(tmp_path: Path) -> None:
    assert cgroup_peak(tmp_path, tmp_path) == (None, "no control groups here (FileNotFoundError)")
    (tmp_path / "cgroup").write_text("0::/job\n2:cpu:/\n")
    value, why = cgroup_peak(tmp_path, tmp_path)
    assert value is None
    assert str(why).startswith("the control group keeps no peak of its memory")
