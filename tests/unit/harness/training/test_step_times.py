"""The log's times: which steps are timed, and when other work on the processors voids them."""

from __future__ import annotations

import numpy as np
import pytest
from harness.measuring.processors import ProcessorTime
from harness.training.logs import Log

from baselines.method import StepFacts


def log_of(seconds: list[float]) -> Log:
    log = Log()
    for step, s in enumerate(seconds):
        facts = StepFacts(grad_norm=None, clipped=None)
        log.step(step, loss=1.0, factor=1.0, facts=facts, tokens=10, total_tokens=12, seconds=s)
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
            seconds=seconds, processor=ProcessorTime(ran, waited),
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
