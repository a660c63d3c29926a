"""Time that may be spent, and how long the next block will take, judged by those that are done."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from harness.efficiency.plan import Unit

BUDGET_S = 480.0
"""Of a measuring session, if nobody says otherwise."""
REPORT_S = 15.0
"""Kept back for tables and figures."""
FIRST_S = 20.0
"""The first block of all, once the worker is up: a model of 7B parameters and some steps."""
MARGIN = 1.3
"""An estimate is taken this many times: a budget that is exceeded is worse than one that is not used up."""


class Budget:
    """Seconds from its making on; None is no end of time.

    Args:
        seconds: in all.
        now: a monotonic clock.
    """

    def __init__(self, seconds: float | None, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._began = now()
        self.seconds = seconds

    def spent(self) -> float:
        """Seconds gone."""
        return self._now() - self._began

    def left(self) -> float:
        """Seconds that blocks may still take."""
        return float("inf") if self.seconds is None else self.seconds - REPORT_S - self.spent()

    def allows(self, estimate_s: float) -> bool:
        """Whether a block of this estimate will be over in time."""
        return MARGIN * estimate_s <= self.left()


@dataclass
class Estimates:
    """Seconds that blocks took, and from them what others will take."""

    taken: list[tuple[Unit, float]] = field(default_factory=list)

    def add(self, unit: Unit, seconds: float) -> None:
        """A block is done."""
        self.taken.append((unit, seconds))

    def of(self, unit: Unit) -> float:
        """Seconds a block may take, rather too long: by the same cell, else its group, its model, or anything."""
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
    """How much more work a block is: by tokens and by parameters, as far as they say; never less than as much."""
    return max(1.0, _size(unit) / _size(than))


def _size(unit: Unit) -> float:
    cell = unit.entry.cell
    parameters = getattr(cell.model, "parameters", 1)
    return float(cell.shape.batch * cell.shape.length * parameters)
