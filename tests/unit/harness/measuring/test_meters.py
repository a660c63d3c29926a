"""Peaks by phase and part of a step, host memory, the step's clock; and a reason where there is no number."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_gpu import MIB, FakeCuda, FakeNvml
from harness.measuring.clock import StepClock
from harness.measuring.device import AllocatorMeter, PhasePeaks, allocator_settings
from harness.measuring.host import HostMeter, cgroup_peak, proportional_set
from harness.measuring.meters import Meters, is_watched
from harness.measuring.processors import ProcessorTime
from harness.measuring.rates import transfer_rates, with_rates
from harness.records.provenance import provenance
from harness.records.run import TrainRecord
from hypothesis import given
from hypothesis import strategies as st

# ---------------------------------------------------------------- host


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
    (tmp_path / "smaps_rollup").write_text("55a7 ---p [rollup]\nRss:  1764 kB\nPss:   297 kB\nPss_Dirty: 1 kB\n")
    assert proportional_set(tmp_path) == (297 * 1024, None)
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


def gpu_meters(cuda: FakeCuda, nvml: FakeNvml | None = None) -> Meters:
    return Meters("cuda", cuda=cuda, nvml=nvml if nvml is not None else FakeNvml())


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


# ---------------------------------------------------------------- clock and copies


def test_the_clock_of_a_step_leaves_pauses_out_on_the_cpu() -> None:
    clock = StepClock("cpu")
    clock.start()
    time.sleep(0.02)
    with clock.paused():
        time.sleep(0.2)
    time.sleep(0.02)
    assert 0.04 <= clock.stop() < 0.15
    assert clock.kind == "perf_counter"


def test_on_the_cpu_a_step_has_the_processor_time_between_its_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = iter([1.0, 1.5, 7.0, 7.25])
    monkeypatch.setattr("harness.measuring.processors._waited_s", lambda: next(waited))
    clock = StepClock("cpu")
    clock.start()
    with clock.paused():
        pass
    clock.stop()
    assert clock.processor is not None
    assert clock.processor.waited_s == pytest.approx(0.75), "what was waited for in the pause is left out"
    assert clock.processor.ran_s >= 0
    monkeypatch.setattr("harness.measuring.processors._waited_s", lambda: None)
    clock.start()
    clock.stop()
    assert clock.processor.waited_s is None
    assert StepClock("cuda", FakeCuda()).processor is None


def test_the_kernel_tells_a_busy_thread_from_one_that_sleeps() -> None:
    before = ProcessorTime.now()
    time.sleep(0.2)
    asleep = ProcessorTime.now().since(before)
    assert asleep.ran_s < 0.1
    outside = time.perf_counter()
    before, began = ProcessorTime.now(), time.perf_counter()
    while time.perf_counter() < began + 0.2:
        pass
    inside = time.perf_counter() - began
    busy = ProcessorTime.now().since(before)
    outside = time.perf_counter() - outside
    if busy.waited_s is None:
        pytest.skip("this kernel keeps no schedstat")
    assert 0.9 * inside <= busy.ran_s + busy.waited_s <= 1.1 * outside, "a thread that is busy runs or waits"


def test_on_cuda_a_step_is_what_its_own_stream_did_between_the_marks() -> None:
    cuda = FakeCuda()
    clock = StepClock("cuda", cuda)
    cuda.work(5)
    clock.start()
    cuda.work(30)
    with clock.paused():
        cuda.work(1000)
    cuda.work(12)
    assert clock.stop() == pytest.approx(0.042)
    assert cuda.waited == 1, "one wait a step, for its last event"
    cuda.work(7)
    clock.start()
    cuda.work(3)
    assert clock.stop() == pytest.approx(0.003)


class FakeTorch:
    """As much of torch as the copies need: a way up takes 10 ms, one down 20 ms, the first of all ten times as long."""

    uint8 = "uint8"

    def __init__(self, *, fails: bool = False) -> None:
        self.cuda, self.fails, self.copies = FakeCuda(), fails, 0

    def empty(self, nbytes: int, *, dtype: str, device: str = "cpu", pin_memory: bool = False) -> Any:
        if self.fails and device == "cuda":
            raise RuntimeError("CUDA out of memory. Tried a lot.\nmore lines")
        outer = self
        assert pin_memory == (device == "cpu"), "copies from pageable memory would be another measurement"

        class Buffer:
            place = device

            def copy_(self, source: Any, *, non_blocking: bool) -> None:
                outer.copies += 1
                slow = 10 if outer.copies == 1 else 1
                outer.cuda.work(slow * (10 if self.place == "cuda" else 20))

        return Buffer()


def test_copies_are_timed_each_way_and_both_ways_at_once_without_the_first() -> None:
    torch = FakeTorch()
    rates = transfer_rates(copy_bytes=1000, repeats=3, torch=torch)
    assert rates.host_to_device_bytes_per_s == pytest.approx(1000 / 0.010)
    assert rates.device_to_host_bytes_per_s == pytest.approx(1000 / 0.020)
    # side by side the slower way decides
    assert rates.both_ways_bytes_per_s == pytest.approx(2000 / 0.020)
    assert rates.rates_why is None
    assert torch.copies == (3 + 1) * 4


def test_copies_that_find_no_memory_are_null_with_a_reason() -> None:
    rates = transfer_rates(copy_bytes=1000, torch=FakeTorch(fails=True))
    assert rates.rates_why == "RuntimeError: CUDA out of memory. Tried a lot."
    assert rates.host_to_device_bytes_per_s is rates.device_to_host_bytes_per_s is rates.both_ways_bytes_per_s is None


def test_a_runs_record_gets_its_machines_rates_unless_it_was_on_the_cpu_or_not_alone() -> None:
    record = TrainRecord(
        name="r", status="ok", model="m", task="t", method="full", module="full", options={}, seed=0,
        recipe={"device": "cuda"}, recipe_changes=[], lr=None, lr_searched=False, steps_done=0, checkpoint=None,
        parameters=None, provenance=provenance(roots=(), inputs={}),
    )  # fmt: skip
    measured = with_rates(record, torch=FakeTorch())
    assert measured.transfer is not None
    assert measured.transfer_why is None
    on_the_cpu = with_rates(record.model_copy(update={"recipe": {"device": "cpu"}}), torch=FakeTorch())
    assert (on_the_cpu.transfer, on_the_cpu.transfer_why) == (None, "the run was on the CPU")
    memory = gpu_meters(FakeCuda(), FakeNvml(processes=[[(4711, 50)]])).record(state_peak_bytes=None)
    beside = with_rates(record.model_copy(update={"memory": memory}), torch=FakeTorch())
    assert (beside.transfer, beside.transfer_why) == (None, f"void: {memory.foreign_why}")


def test_meters_and_clock_can_be_imported_without_torch() -> None:
    names = ("card", "clock", "device", "gpu", "host", "meters", "nvml", "rates")
    code = f"import sys, {', '.join(f'harness.measuring.{n}' for n in names)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
