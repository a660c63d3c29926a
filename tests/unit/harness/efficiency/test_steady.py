"""Timing by turns until the ratios are known: the interval of a median, disturbed rounds, and the end of patience."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
from harness.efficiency.steady import half_width, until_steady
from harness.measuring.clock import StepClock
from harness.measuring.processors import ProcessorTime


class Watch(StepClock):
    """Says what the test wants: wall time, processor time, time waited."""

    def __init__(self, spans: Iterator[tuple[float, float, float]]) -> None:
        super().__init__("cpu")
        self._given = spans

    def start(self) -> None:
        pass

    def stop(self) -> float:
        wall, self._ran, self._waited = next(self._given)
        return wall

    @property
    def processor(self) -> ProcessorTime:
        return ProcessorTime(self._ran, self._waited)


def clock(spans: Callable[[int], tuple[float, float, float]]) -> Callable[[], StepClock]:
    return lambda: Watch(spans(number) for number in range(10**9))


def nothing() -> None:
    pass


def test_the_interval_of_six_is_from_the_least_to_the_most_and_of_five_there_is_none() -> None:
    assert half_width([1, 2, 3, 4, 5, 6]) == pytest.approx((6 - 1) / 2 / 3.5)
    assert half_width([1, 2, 3, 4, 5]) is None


def test_the_interval_holds_the_true_median_in_95_of_100_cases() -> None:
    """Of a skewed distribution, whose median is 1; the half width is checked through the ends that it is made of."""
    generator = random.Random(0)
    held, cases, count = 0, 2000, 21
    for _ in range(cases):
        values = sorted(generator.lognormvariate(0, 0.5) for _ in range(count))
        # 21 values: the sixth from either end (binomial table, 2 P(X <= 5) = 0.027, one more would be 0.078)
        assert half_width(values) == pytest.approx((values[15] - values[5]) / 2 / values[10])
        held += values[5] <= 1 <= values[15]
    assert 0.955 < held / cases < 0.99


def test_it_ends_as_soon_as_the_ratio_is_known() -> None:
    timed = until_steady(
        {"ours": nothing, "peer": nothing}, warmup=3, least=10, most=1000, clock=clock(lambda n: (1.0, 1.0, 0.0))
    )
    assert timed.rounds == 10
    assert timed.widths == {"peer": 0.0}
    assert timed.disturbed == 0


def test_what_scatters_is_timed_to_the_end_and_says_how_far_it_came() -> None:
    generator = random.Random(1)
    timed = until_steady(
        {"ours": nothing, "peer": nothing}, warmup=0, least=10, most=40,
        clock=clock(lambda n: (1.0, generator.uniform(0.5, 1.5), 0.0)),
    )  # fmt: skip
    assert timed.rounds == 40
    width = timed.widths["peer"]
    assert width is not None
    assert width > 0.01


def test_a_round_that_other_work_disturbed_does_not_count_and_the_reason_is_kept() -> None:
    """Every third call waits for a processor for half of its time."""
    timed = until_steady(
        {"ours": nothing, "peer": nothing}, warmup=0, least=6, most=60,
        clock=clock(lambda n: (2.0, 1.0, 1.0) if n % 3 == 0 else (1.0, 1.0, 0.0)),
    )  # fmt: skip
    assert timed.rounds == 6
    assert set(timed.wall_s["ours"]) == {1.0}
    assert timed.disturbed == 12
    assert timed.disturbed_why is not None
    assert "50 %" in timed.disturbed_why


def test_where_every_round_is_disturbed_there_is_no_time_at_all() -> None:
    timed = until_steady(
        {"ours": nothing, "peer": nothing}, warmup=0, least=6, most=12, clock=clock(lambda n: (2.0, 1.0, 1.0))
    )
    assert (timed.rounds, timed.disturbed) == (0, 12)
    assert timed.widths == {"peer": None}


def test_speed_is_judged_by_processor_time_on_a_cpu() -> None:
    """The peer waits for its disk: its wall time says nothing about its arithmetic."""
    spans = clock(lambda n: (1.0, 1.0, 0.0) if n % 4 in (0, 3) else (9.0, 2.0, 0.0))
    timed = until_steady({"ours": nothing, "peer": nothing}, warmup=0, least=6, most=6, clock=spans)
    assert timed.judged_s == {"ours": [1.0] * 6, "peer": [2.0] * 6}
    assert timed.wall_s["peer"] == [9.0] * 6
