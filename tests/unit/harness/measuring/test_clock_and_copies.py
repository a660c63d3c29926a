"""The clock of a step and the processor time in it, and how fast copies go each way."""

from __future__ import annotations

import time
from typing import Any

import pytest
from fake_gpu import FakeCuda, FakeNvml, gpu_meters
from harness.measuring.clock import StepClock
from harness.measuring.processors import ProcessorTime
from harness.measuring.rates import transfer_rates, with_rates
from harness.records.provenance import provenance
from harness.records.run import TrainRecord


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
    # on a loaded machine the kernel's waiting time may run behind for a moment: one of three tries must fit
    assert any(busy_thread_adds_up() for _ in range(3)), "a thread that is busy runs or waits"


def busy_thread_adds_up() -> bool:
    outside = time.perf_counter()
    before, began = ProcessorTime.now(), time.perf_counter()
    while time.perf_counter() < began + 0.2:
        pass
    inside = time.perf_counter() - began
    busy = ProcessorTime.now().since(before)
    outside = time.perf_counter() - outside
    if busy.waited_s is None:
        pytest.skip("this kernel keeps no schedstat")
    return 0.9 * inside <= busy.ran_s + busy.waited_s <= 1.1 * outside


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
