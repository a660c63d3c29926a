"""The time budget of a session, and estimates of the time of the next block from the blocks done so far."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from harness.efficiency.plan import Unit

BUDGET_S = 480.0
"""Default budget of a measuring session, in seconds."""
REPORT_S = 15.0
"""Seconds reserved for tables and figures."""
FIRST_S = 20.0
"""Estimate for the very first block, in seconds once the worker has started: a 7B model and some steps."""
MARGIN = 1.3
"""Safety factor on estimates: exceeding a budget is worse than not using it up."""


class Budget:
    """A number of seconds from its creation on.

    Args:
        seconds: in total; None for no limit.
        now: a monotonic clock.
    """

    def __init__(self, seconds: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._began = now()
        self.seconds = seconds

    def spent(self) -> float:
        """Seconds since the budget was created."""
        return self._now() - self._began

    def left(self) -> float:
        """Seconds that blocks may still take."""
        return float("inf") if self.seconds is None else self.seconds - REPORT_S - self.spent()

    def allows(self, estimate_s: float) -> bool:
        """Whether a block with this estimate will finish in time."""
        return MARGIN * estimate_s <= self.left()


@dataclass
class Estimates:
    """Measured seconds of blocks, and estimates for other blocks from them."""

    taken: list[tuple[Unit, float]] = field(default_factory=list)

    def add(self, unit: Unit, seconds: float) -> None:
        """Add the time of a finished block."""
        self.taken.append((unit, seconds))

    def of(self, unit: Unit) -> float:
        """Cautious estimate of a block's seconds: from the same cell, else its group, its model, or any block."""
        same_kind = [(u, s) for u, s in self.taken if u.do == unit.do] or self.taken
        for alike in (_same_cell, _same_group, _same_model):
            found = [seconds * _more_work(unit, other) for other, seconds in same_kind if alike(unit, other)]
            if found:
                return max(found)
        return max((seconds * _more_work(unit, other) for other, seconds in same_kind), default=FIRST_S)


def _same_cell(a: Unit, b: Unit) -> bool:
    return a.entry.named == b.entry.named


def _same_group(a: Unit, b: Unit) -> bool:
    x, y = a.entry.named, b.entry.named
    return (x.model, x.settings, x.shape) == (y.model, y.settings, y.shape)


def _same_model(a: Unit, b: Unit) -> bool:
    return a.entry.named.model == b.entry.named.model


def _more_work(unit: Unit, than: Unit) -> float:
    """Factor by which `unit` is more work than `than`: by tokens and, if known, by parameters; at least 1."""
    return max(1.0, _size(unit) / _size(than))


def _size(unit: Unit) -> float:
    cell = unit.entry.cell
    parameters = getattr(cell.model, "parameters", 1)
    return float(cell.shape.batch * cell.shape.length * parameters)
