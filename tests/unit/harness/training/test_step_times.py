"""The log's times: which steps are timed, and when other work on the processors voids them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from harness.measuring.energy import Joules
from harness.measuring.processors import ProcessorTime
from harness.training.logs import Log

from baselines.method import StepFacts

NO_ENERGY = Joules(None, "the run was on the CPU")


def log_of(seconds: list[float], energy: Sequence[Joules] = ()) -> Log:
    log = Log()
    for step, s in enumerate(seconds):
        facts = StepFacts(grad_norm=None, clipped=None)
        log.step(
            step, loss=1.0, factor=1.0, facts=facts, tokens=10, total_tokens=12, seconds=s,
            energy=energy[step] if energy else NO_ENERGY,
        )  # fmt: skip
    return log


def test_only_whole_periods_after_the_warm_up_are_timed() -> None:
    seconds = [float(n) for n in range(1, 51)]
    timing = log_of(seconds).timing(load_s=0.0, period_steps=8, clock="cuda events")
    # a warm-up of 5 steps ends in the first period, and the last two steps are no whole one
    timed = seconds[8:48]
    assert (timing.warmup_steps, timing.timed_steps) == (8, 40)
    assert timing.step_median_s == np.median(timed)
    assert timing.step_p95_s == np.quantile(timed, 0.95)
    assert timing.throughput_tokens_per_s == pytest.approx(10 * 40 / sum(timed))
    assert timing.throughput_total_tokens_per_s == pytest.approx(12 * 40 / sum(timed))
    assert timing.train_s == sum(seconds)
    assert (timing.clock, timing.device_synchronised) == ("cuda events", True)


def crowded_log(*steps: tuple[float, float, float | None]) -> Log:
    """Of steps with these (seconds, processor time, time waited)."""
    log = log_of([])
    for step, (seconds, ran, waited) in enumerate(steps):
        log.step(
            step, loss=1.0, factor=1.0, facts=StepFacts(grad_norm=None, clipped=None), tokens=0, total_tokens=0,
            seconds=seconds, energy=NO_ENERGY, processor=ProcessorTime(ran, waited),
        )  # fmt: skip
    return log


@pytest.mark.parametrize(
    ("steps", "share"),
    [
        ([(1.0, 0.95, 0.05)] * 9, None),
        ([(1.0, 0.5, 0.5), (1.0, 1.0, 0.0)], 25),
        # one long wait among many steps is no reason
        ([(1.0, 1.0, 0.0)] * 19 + [(2.0, 1.0, 1.0)], None),
        # two threads: the processor time of both, and what both waited
        ([(1.0, 1.9, 0.1)], None),
        ([(1.0, 1.2, 0.8)], 40),
        # a process that sleeps waits for no processor
        ([(1.0, 0.3, 0.0)], None),
        # the kernel does not say: one thread at least has work to do all the time
        ([(1.0, 0.6, None)], 40),
        ([(1.0, 1.3, None)], None),
    ],
)
def test_a_wait_for_processors_is_a_share_of_the_time_wanted(
    steps: list[tuple[float, float, float | None]], share: int | None
) -> None:
    log = crowded_log(*steps)
    why = log.judge_times(foreign_why=None, alloc_retries=None)
    if share is None:
        assert (why, log.notes) == (None, [])
        assert None not in [row["step_s"] for row in log.steps]
    else:
        assert f"for {share} % of the time that the steps wanted one (10 % are allowed)" in str(why)
        assert {row["step_s"] for row in log.steps} == {None}


def test_steps_on_a_gpu_and_of_older_resume_states_wait_for_no_processor() -> None:
    log = log_of([0.5] * 3)
    del log.steps[0]["processor_s"]
    assert log.judge_times(foreign_why=None, alloc_retries=None) is None
    assert log.timing(load_s=0.0, period_steps=1, clock="cuda events").processor_s is None


@pytest.mark.parametrize(
    ("steps", "period", "excluded", "why"),
    [
        (0, 1, 0, "no step after the warm-up"),
        (3, 1, 3, "no step after the warm-up"),
        (60, 50, 50, "no whole period of 50 steps after the warm-up"),
    ],
)
def test_too_few_steps_have_no_throughput_and_a_reason(steps: int, period: int, excluded: int, why: str) -> None:
    timing = log_of([0.5] * steps).timing(load_s=0.0, period_steps=period, clock="perf_counter")
    assert (timing.throughput_tokens_per_s, timing.step_median_s, timing.step_p95_s) == (None, None, None)
    assert (timing.throughput_why, timing.timed_steps, timing.warmup_steps) == (why, 0, excluded)
    assert timing.train_s == 0.5 * steps


def test_steps_of_an_older_resume_state_have_no_count_of_padding() -> None:
    log = log_of([0.5] * 20)
    del log.steps[10]["total_tokens"]
    timing = log.timing(load_s=0.0, period_steps=1, clock="perf_counter")
    assert timing.throughput_total_tokens_per_s is None
    assert timing.throughput_tokens_per_s == pytest.approx(20.0)


# ---------------------------------------------------------------- energy


def test_energy_by_tokens_is_of_the_steps_that_throughput_is_of() -> None:
    """A warm-up of 3 steps and the unfinished period at the end cost a thousand times as much."""
    spent = [Joules(1000.0) if step < 3 or step == 12 else Joules(2.0 + step) for step in range(13)]
    timing = log_of([0.5] * 13, spent).timing(load_s=0.0, period_steps=3, clock="cuda events")
    timed = sum(2.0 + step for step in range(3, 12))
    assert (timing.warmup_steps, timing.timed_steps) == (3, 9)
    assert timing.energy_j_per_1000_tokens == pytest.approx(1000 * timed / (10 * 9))
    assert timing.train_energy_j == pytest.approx(timed + 4000.0)
    assert timing.energy_why is None


def test_one_step_without_energy_leaves_its_sum_unknown_and_the_other_known() -> None:
    spent = [Joules(None, "the counter went back"), *[Joules(5.0)] * 9]
    timing = log_of([1.0] * 10, spent).timing(load_s=0.0, period_steps=1, clock="cuda events")
    assert (timing.train_energy_j, timing.energy_why) == (None, "the counter went back")
    assert timing.energy_j_per_1000_tokens == pytest.approx(500.0), "the first step is warm-up"
    last = log_of([1.0] * 10, spent[::-1]).timing(load_s=0.0, period_steps=1, clock="cuda events")
    assert (last.energy_j_per_1000_tokens, last.energy_why) == (None, "the counter went back")


def test_steps_too_short_for_the_counter_have_no_energy() -> None:
    timing = log_of([0.25] * 10, [Joules(5.0)] * 10).timing(load_s=0.0, period_steps=1, clock="cuda events")
    assert timing.train_energy_j == 50.0
    why = "1.75 s were measured, and the card's energy counter needs 2 s"
    assert (timing.energy_j_per_1000_tokens, timing.energy_why) == (None, why)


def test_void_times_and_void_cards_leave_no_energy() -> None:
    log = log_of([1.0] * 10, [Joules(5.0)] * 10)
    log.prepare_energy_j, log.prepare_energy_why = 7.0, None
    crowded = log.timing(load_s=0.0, period_steps=1, clock="cuda events", void_why="crowded")
    assert (crowded.train_energy_j, crowded.energy_j_per_1000_tokens) == (None, None)
    assert crowded.energy_why == "void: crowded"
    log.judge_energy(None)
    assert log.timing(load_s=0.0, period_steps=1, clock="cuda events").prepare_energy_j == 7.0
    log.judge_energy("void: a neighbour")
    found = log.timing(load_s=0.0, period_steps=1, clock="cuda events")
    assert found.prepare_energy_j is found.train_energy_j is found.energy_j_per_1000_tokens is None
    assert found.prepare_energy_why == found.energy_why == "void: a neighbour"
    assert {row["energy_j"] for row in log.steps} == {None}


def test_no_step_and_steps_of_an_older_resume_state_have_no_energy() -> None:
    none = Log().timing(load_s=0.0, period_steps=1, clock="cuda events")
    assert (none.train_energy_j, none.energy_why) == (None, "no step was made")
    log = log_of([1.0] * 10, [Joules(5.0)] * 10)
    del log.steps[5]["energy_j"]
    timing = log.timing(load_s=0.0, period_steps=1, clock="cuda events")
    why = "steps of an older resume state have no energy"
    assert (timing.train_energy_j, timing.energy_j_per_1000_tokens, timing.energy_why) == (None, None, why)
