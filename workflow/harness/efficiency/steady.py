"""Contenders timed by turns until their ratios are known well enough, rounds that other work disturbed left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

from harness.efficiency.by_turns import ratios
from harness.measuring.clock import StepClock
from harness.measuring.processors import crowded_why

BOUND = 0.01
"""Wanted: the 95 % interval of a median ratio reaches at most so far to either side, as a share of it."""


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the median, as a share of the median; None of fewer than six values.

    The interval is that of order statistics, which assumes nothing of how values lie: the least and the most of six
    hold the true median between them in 97 % of cases.
    """
    count = len(values)
    if count < 6:
        return None
    # the largest k for which the k-th value from either end lies on the wrong side of the median in 5 % of cases
    wrong, cut = 2 * 0.5**count, 1
    while wrong + 2 * math.comb(count, cut) * 0.5**count <= 0.05:
        wrong += 2 * math.comb(count, cut) * 0.5**count
        cut += 1
    ordered = sorted(values)
    return (ordered[count - cut] - ordered[cut - 1]) / 2 / median(values)


@dataclass
class Timed:
    """Seconds of one call of every contender, one entry for every round that counts."""

    wall_s: dict[str, list[float]]
    processor_s: dict[str, list[float]]
    """Processor time of all threads; empty on CUDA, where steps are not the processors' work."""
    disturbed: int = 0
    """Rounds that do not count: other work held the processors."""
    disturbed_why: str | None = None
    """Of the last of them."""
    widths: dict[str, float | None] = field(default_factory=dict)
    """Half width of the ratio of the first contender to each other one."""

    @property
    def judged_s(self) -> dict[str, list[float]]:
        """What ratios are made of: processor time, which neighbours hardly change, or on CUDA the events' time."""
        return self.processor_s or self.wall_s

    @property
    def rounds(self) -> int:
        """Rounds that count."""
        return len(next(iter(self.wall_s.values())))


def until_steady(
    contenders: Mapping[str, Callable[[], object]],
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    warmup: int,
    least: int,
    most: int,
    bound: float = BOUND,
    clock: Callable[[], StepClock] | None = None,
) -> Timed:
    """Let every contender take a turn in every round, until each ratio to the first one is known to `bound`.

    Every other round goes the reverse way, so that a machine that grows slower does so for all alike.

    Args:
        contenders: by name; the first one is compared with the others.
        device: whose clock counts.
        warmup: rounds that are not recorded.
        least: rounds made at least; a multiple of the period of what is drawn.
        most: rounds made at most, disturbed ones with them.
        bound: largest half width (see `half_width`).
        clock: makes a clock, for tests.
    """
    watch = (clock or (lambda: StepClock(device)))()
    timed = Timed({name: [] for name in contenders}, {name: [] for name in contenders} if device == "cpu" else {})
    first, *others = contenders
    for number in range(warmup + most):
        wall: dict[str, float] = {}
        ran: dict[str, float] = {}
        why: str | None = None
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            watch.start()
            contenders[name]()
            wall[name], used = watch.stop(), watch.processor
            if used is not None:
                ran[name] = used.ran_s
                why = why or crowded_why(ran_s=used.ran_s, waited_s=used.waited_s, wall_s=wall[name])
        if number < warmup:
            continue
        if why is not None:
            timed.disturbed, timed.disturbed_why = timed.disturbed + 1, why
        else:
            for found, taken in ((timed.wall_s, wall), (timed.processor_s, ran)):
                for name, seconds in taken.items():
                    found[name].append(seconds)
        judged = timed.judged_s
        timed.widths = {name: half_width(ratios(judged[name], judged[first])) for name in others}
        known = [width is not None and width <= bound for width in timed.widths.values()]
        if timed.rounds >= least and timed.rounds % least == 0 and all(known):
            break
    return timed
