"""Peaks by phase and part of a step, and all meters of a run; and a reason where there is no number."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from fake_gpu import MIB, FakeCuda, FakeNvml, gpu_meters
from harness.measuring.device import AllocatorMeter, PhasePeaks, allocator_settings
from harness.measuring.meters import Meters, is_watched
from hypothesis import given
from hypothesis import strategies as st

# ---------------------------------------------------------------- phases within phases


def peaks_of(cuda: FakeCuda) -> PhasePeaks:
    meter = AllocatorMeter("cuda", cuda)
    return PhasePeaks(AllocatorMeter.KINDS, meter.peaks, meter.restart)


def test_an_inner_phase_takes_nothing_from_the_peak_of_the_outer_one() -> None:
    cuda = FakeCuda()
    nested = peaks_of(cuda)
    with nested.phase("step"):
        cuda.use(900)
        cuda.use(100)
        with nested.phase("forward"):
            cuda.use(700)
            cuda.use(300)
        with nested.phase("backward"):
            cuda.use(500)
            cuda.use(50)
        cuda.use(60)
    assert nested.by_phase["allocated"] == {"forward": 700, "backward": 500, "step": 900}
    # reserved memory stays
    assert nested.by_phase["reserved"] == {"forward": 900, "backward": 900, "step": 900}


def test_the_highest_inner_peak_is_the_outer_ones_at_least() -> None:
    cuda = FakeCuda()
    nested = peaks_of(cuda)
    with nested.phase("step"):
        with nested.phase("forward"):
            cuda.use(700)
            cuda.use(10)
        with nested.phase("update"):
            cuda.use(20)
    with nested.phase("step"):
        pass
    assert nested.by_phase["allocated"] == {"forward": 700, "update": 20, "step": 700}


def test_what_the_harness_uses_for_itself_counts_in_no_phase() -> None:
    cuda = FakeCuda()
    nested = peaks_of(cuda)
    with nested.phase("step"):
        cuda.use(300)
        cuda.use(100)
        with nested.excluded():
            cuda.use(5000)
            cuda.use(100)
        cuda.use(200)
    assert nested.by_phase["allocated"] == {"step": 300}


def test_an_exception_inside_closes_every_phase() -> None:
    cuda = FakeCuda()
    nested = peaks_of(cuda)

    def runs_out() -> None:
        cuda.use(700)
        raise MemoryError

    with pytest.raises(MemoryError), nested.phase("step"), nested.phase("forward"):
        runs_out()
    with nested.phase("save"):
        cuda.use(800)
    assert nested.by_phase["allocated"] == {"forward": 700, "step": 700, "save": 800}


Tree = st.recursive(
    st.integers(0, 1000), lambda inside: st.lists(inside, max_size=4).map(lambda items: ("phase", items)), max_leaves=25
)


@given(Tree, st.integers(0, 1000))
def test_every_phase_has_the_highest_of_all_that_was_allocated_in_it(tree: Any, first: int) -> None:
    cuda = FakeCuda()
    nested = peaks_of(cuda)
    cuda.use(first)
    expected: dict[str, int] = {}

    def walk(node: Any, name: str) -> int:
        """Carry out a node; the highest value seen in it."""
        if isinstance(node, int):
            cuda.use(node)
            return node
        highest = cuda.now
        with nested.phase(name):
            for number, child in enumerate(node[1]):
                highest = max(highest, walk(child, f"{name}.{number}"))
        expected[name] = highest
        return highest

    walk(("phase", [tree]), "root")
    assert nested.by_phase["allocated"] == expected


def test_the_parts_of_a_step_are_told_apart_only_where_no_method_looks_at_the_allocators_peak() -> None:
    period, steps = 5, 30
    watched = [step for step in range(steps) if is_watched(step, period)]
    assert watched == [6, 14, 16, 24, 26], "one a period, the second step and the last in turn"
    assert not any(step < period or step % period == 0 for step in watched)
    assert [s for s in range(8) if is_watched(s, 2)] == [3, 5, 7]
    assert not any(is_watched(step, 1) for step in range(10))


def test_on_the_cpu_the_parts_of_a_step_cost_nothing_and_leave_no_trace() -> None:
    meters = Meters("cpu")
    with meters.phase("steady"), meters.parts(6, 5)("forward"):
        pass
    record = meters.record(state_peak_bytes=None)
    assert set(record.host_peak_bytes) == {"steady"}
    assert record.device_allocated_peak_bytes == {"steady": None}
    assert record.watched_steps is None


# ---------------------------------------------------------------- all meters of a run


def test_a_runs_record_has_outer_phases_parts_of_steps_and_the_allocators_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    cuda = FakeCuda()
    cuda.retries = 4  # of an earlier run of this process
    meters = gpu_meters(cuda)
    with meters.phase("load"):
        cuda.use(100)
    for step in range(5, 7):
        with meters.phase("steady"):
            part = meters.parts(step, 5)
            with part("forward"):
                cuda.use(600)
            with part("backward"):
                cuda.use(400)
                cuda.use(150)
            with part("update"):
                cuda.use(200)
                cuda.use(100)
    meters.pinned(None)
    meters.pinned(7)
    meters.pinned(5)
    cuda.retries = 6
    record = meters.record(state_peak_bytes=12)
    assert record.device_allocated_peak_bytes == {
        "load": 100, "forward": 600, "backward": 600, "update": 200, "steady": 600,
    }  # fmt: skip
    assert record.watched_steps == 1, "step 5 begins a period"
    assert record.reserved_to_allocated_ratio == 1.0
    assert (record.alloc_retries, record.alloc_conf) == (2, "expandable_segments:True")
    assert (record.method_pinned_peak_bytes, record.method_pinned_why) == (7, None)
    assert (record.torch_pinned_peak_bytes, record.torch_pinned_why) == (4096, None)
    assert record.device_why is None
    assert record.foreign_why is None
    assert set(record.host_pss_bytes) == {"load", "steady", "end"}


def test_on_the_cpu_every_device_figure_is_null_with_a_reason() -> None:
    meters = Meters("cpu")
    with meters.phase("steady"):
        pass
    record = meters.record(state_peak_bytes=12)
    why = "the run was on the CPU"
    assert record.device_allocated_peak_bytes == {"steady": None}
    assert record.device_reserved_peak_bytes == {"steady": None}
    assert record.device_why == record.nvml_why == record.nvml_delta_why == record.torch_pinned_why == why
    assert (record.nvml_process_peak_bytes, record.nvml_device_peak_bytes) == (None, None)
    assert (record.nvml_source, record.nvml_poll_s, record.alloc_retries) == (None, None, None)
    assert record.reserved_to_allocated_ratio is None
    assert (record.method_pinned_peak_bytes, record.method_pinned_why) == (None, "the method did not say")
    assert record.state_peak_bytes == 12
    assert meters.gpu_record() == (None, why)


def test_a_foreign_process_voids_every_figure_of_device_memory_and_leaves_the_hosts() -> None:
    cuda = FakeCuda()
    meters = gpu_meters(cuda, FakeNvml(processes=[[(4711, 50 * MIB)]]))
    with meters.phase("steady"):
        cuda.use(600)
    record = meters.record(state_peak_bytes=12)
    why = "1 compute process(es) were on the GPU before the run began (pid 4711)"
    assert record.foreign_why == why
    assert record.device_why == record.nvml_why == record.nvml_delta_why == f"void: {why}"
    assert record.device_allocated_peak_bytes == record.device_reserved_peak_bytes == {"steady": None}
    assert (
        record.nvml_process_peak_bytes is record.nvml_device_peak_bytes is record.nvml_device_delta_peak_bytes is None
    )
    assert (record.nvml_source, record.reserved_to_allocated_ratio) == (None, None)
    assert record.state_peak_bytes == 12
    assert set(record.host_peak_bytes) == {"steady"}


def test_torch_without_statistics_of_pinned_memory_is_a_reason() -> None:
    silent = FakeCuda()
    silent.host_memory_stats = dict  # type: ignore[assignment,method-assign]
    assert AllocatorMeter("cuda", silent).pinned_peak() == (None, "torch's statistics of pinned memory name no peak")
    older = SimpleNamespace(memory_stats_as_nested_dict=dict)
    why = "this version of torch keeps no statistics of pinned memory"
    assert AllocatorMeter("cuda", older).pinned_peak() == (None, why)


def test_the_allocators_settings_are_read_under_both_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    assert allocator_settings() == ""
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "old")
    assert allocator_settings() == "old"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "new")
    assert allocator_settings() == "new"


def test_meters_and_clock_can_be_imported_without_torch() -> None:
    names = ("card", "clock", "device", "gpu", "host", "meters", "nvml", "rates")
    code = f"import sys, {', '.join(f'harness.measuring.{n}' for n in names)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
