"""Arithmetic on step times. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from harness.efficiency.record import TimingBlock

PERIOD = 5
"""Steps between two draws while steps are timed: few, so that some seconds of timing contain several draws."""


def mean_step_s(step_s: Sequence[float], period: int | None) -> float:
    """Mean seconds per step in a run that draws every `period` steps.

    A draw adds time to the step that ends a period (or begins one) and to the first step after it. So a longer period
    still has one such pair of steps, and more ordinary steps between.

    Args:
        step_s: seconds of each step, in whole periods of `PERIOD` steps.
        period: steps between two draws; None if the method draws nothing, so that all steps have equal weight.
    """
    if period is None:
        return fmean(step_s)
    first, last = step_s[::PERIOD], step_s[PERIOD - 1 :: PERIOD]
    between = [seconds for place, seconds in enumerate(step_s) if place % PERIOD not in (0, PERIOD - 1)]
    return (fmean(first) + fmean(last) + (period - 2) * fmean(between)) / period


WANTED_ERROR = 0.01
"""Largest standard error of a cell's mean tokens/s over its repeats, as a share of it: above it, it is timed again."""


def relative_error(values: Sequence[float]) -> float | None:
    """Standard error of the values' mean, as a share of it; None of fewer than two."""
    return stdev(values) / len(values) ** 0.5 / fmean(values) if len(values) > 1 else None


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """The steps of all repeats together."""

    count: int
    median_s: float
    p95_s: float
    mean_reach: float
    """Mean share of the decoder layers that backward visits."""
    moved_bytes: float | None
    """Bytes copied between device and host per step."""
    exposed_s: float | None
    """Seconds per step spent waiting for these copies."""


def pool(blocks: Sequence[TimingBlock]) -> Pooled:
    """Combine the repeats of one cell, of which there must be at least one."""
    seconds = [second for block in blocks for second in block.step_s]
    moved = [b.moved_bytes_per_step for b in blocks if b.moved_bytes_per_step is not None]
    exposed = [b.exposed_copy_s_per_step for b in blocks if b.exposed_copy_s_per_step is not None]
    return Pooled(
        count=len(seconds),
        median_s=median(seconds),
        p95_s=percentile(seconds, 0.95),
        mean_reach=fmean(block.mean_reach for block in blocks),
        moved_bytes=fmean(moved) if moved else None,
        exposed_s=fmean(exposed) if exposed else None,
    )
