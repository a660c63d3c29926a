"""What GRASS is held to: goals that were set before anything was measured, and what came of them.

The goals are those of the project's performance note; a goal is a ratio between equal settings, or a plain number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Literal

from harness.efficiency.arithmetic import mean_step_s
from harness.efficiency.plan import RESIDENT
from harness.reporting.efficiency.memory_table import NOT_MEASURED, OTHER_CODE, REFERENCE
from harness.reporting.efficiency.rows import Rows, Source, ratio
from harness.reporting.efficiency.sheets import GIB, sheet
from harness.reporting.efficiency.speed_tables import FULL
from harness.reporting.table import UNKNOWN, Footnotes, Table, number

SUBJECT, LIGHT = "grass", "grass-decoder"
MAIN = "llama-2-7b"
SAMPLE_EVERY = 100
"""Steps to one probing batch in the goal about probing."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """One goal, the paper's own figure, and ours."""

    name: str
    better: Literal["smaller", "larger"]
    paper: float | None = None
    parity: float | None = None
    """As good as what it is compared with."""
    good: float | None = None
    best: float | None = None
    """Near the floor that arithmetic gives."""
    measured: float | None
    forecast: float | None = None
    digits: int = 3
    unit: str = ""

    def reached(self, value: float | None) -> str | None:
        """The highest goal that `value` reaches; `none` where it reaches none, None where it is unknown."""
        if value is None:
            return None
        goals = (("best", self.best), ("good", self.good), ("parity", self.parity))
        reached = (name for name, goal in goals if goal is not None and self._at_least(value, goal))
        return next(reached, "none")

    def _at_least(self, value: float, goal: float) -> bool:
        return value <= goal if self.better == "smaller" else value >= goal


def targets(rows: Rows) -> list[Target]:
    """Every goal with what is known of it."""
    found = [
        _memory_ratio(rows, LIGHT, REFERENCE, "lean 1x1024", parity=0.95, good=0.93, best=0.92),
        _memory_ratio(rows, LIGHT, REFERENCE, "lean 4x1024", parity=0.95, good=0.94, best=0.92),
        _memory_ratio(rows, LIGHT, REFERENCE, "plain 1x1024", parity=0.95, good=0.93, best=0.88),
        _memory_ratio(
            rows, SUBJECT, REFERENCE, "plain 1x1024", paper=round(19.08 / 19.97, 3), parity=0.95, good=0.93, best=0.88
        ),
        _memory_ratio(rows, SUBJECT, "lisa", "plain 1x1024", paper=round(19.08 / 22.31, 3), parity=1.0),
        _memory_ratio(rows, SUBJECT, "lisa-keep", "plain 1x1024", paper=round(19.08 / 22.31, 3), parity=1.0),
    ]
    found += [
        _absolute(rows, model, good) for model, good in ((MAIN, 13.6), ("gemma-2b", 5.3), ("tinyllama-1.1b", 2.4))
    ]
    found += [_speed(rows, "lean", "4x1024", method, REFERENCE) for method in (SUBJECT, LIGHT)]
    found += [_speed(rows, "plain", "1x1024", method, REFERENCE) for method in (SUBJECT, LIGHT)]
    found += [_speed(rows, "lean", "4x1024", method, FULL) for method in (SUBJECT, LIGHT)]
    return [*found, _overhead(rows), _probe_share(rows), _probe_peak(rows)]


def _memory_ratio(
    rows: Rows, method: str, base: str, where: str, *, parity: float, good: float | None = None,
    best: float | None = None, paper: float | None = None,
) -> Target:  # fmt: skip
    settings, shape = where.split()
    row, other = rows.get(MAIN, settings, shape, method), rows.get(MAIN, settings, shape, base)

    def found(source: Source) -> float | None:
        return None if row is None or other is None else ratio(row.peak(source), other.peak(source))

    return Target(
        name=f"peak memory of {method} to {base}, {where}",
        better="smaller",
        measured=found("measured"),
        forecast=found("forecast"),
        paper=paper,
        parity=parity,
        good=good,
        best=best,
    )


def _absolute(rows: Rows, model: str, good: float) -> Target:
    row = rows.get(model, "lean", "1x1024", LIGHT)

    def found(source: Source) -> float | None:
        figure = None if row is None else row.peak(source)
        return None if figure is None else figure.value / GIB

    return Target(
        name=f"peak memory of {LIGHT} on {model}, lean 1x1024",
        better="smaller",
        good=good,
        measured=found("measured"),
        forecast=found("forecast"),
        digits=2,
        unit=" GiB",
    )


def _speed(rows: Rows, settings: str, shape: str, method: str, base: str) -> Target:
    row, other = rows.get(MAIN, settings, shape, method), rows.get(MAIN, settings, shape, base)
    to_lora = base == REFERENCE
    return Target(
        name=f"tokens/s of {method} to {base}, {settings} {shape}",
        better="larger",
        paper=1.08 if to_lora and method == SUBJECT and shape == "4x1024" else None,
        parity=1.00 if to_lora else 1.4,
        good=1.15 if to_lora else 1.6,
        best=1.25 if to_lora else 1.8,
        measured=_middle(row.speed_ratios(other)) if row is not None else None,
    )


def _overhead(rows: Rows) -> Target:
    move = rows.get(MAIN, "lean", "4x1024", LIGHT)
    resident = rows.get(MAIN, "lean", "4x1024", LIGHT, RESIDENT)
    shares = [] if move is None else [1 - share for share in move.speed_ratios(resident)]
    return Target(
        name=f"tokens/s lost by moving moments, {LIGHT}, lean 4x1024",
        better="smaller", parity=0.08, good=0.02, best=0.005, measured=_middle(shares),
    )  # fmt: skip


def _probe_share(rows: Rows) -> Target:
    row = rows.get(MAIN, "lean", "4x1024", LIGHT)
    shares = [
        block.probe_s / block.probe_batches / (SAMPLE_EVERY * mean_step_s(block.step_s, block.own_period_steps))
        for block in (row.blocks if row is not None else ())
        if block.probe_s is not None
    ]
    return Target(
        name=f"time of one probing batch every {SAMPLE_EVERY} steps, {LIGHT}, lean 4x1024",
        better="smaller", paper=0.04, parity=0.05, good=0.02, best=0.01, measured=_middle(shares),
    )  # fmt: skip


def _probe_peak(rows: Rows) -> Target:
    row = rows.get(MAIN, "lean", "4x1024", LIGHT)
    memory = None if row is None or row.measured is None else row.measured.memory
    forecast = None if row is None or row.forecast is None else row.forecast.by_phase_bytes
    return Target(
        name=f"memory of probing beyond the step's peak, {LIGHT}, lean 4x1024",
        better="smaller",
        best=0.0,
        measured=_beyond(None if memory is None else memory.device_allocated_peak_bytes),
        forecast=_beyond(forecast),
        digits=2,
        unit=" GiB",
    )


def _beyond(by_phase: Mapping[str, int | None] | None) -> float | None:
    """GiB of the probe's peak beyond that of all other phases of a step."""
    known = {phase: peak for phase, peak in (by_phase or {}).items() if peak is not None}
    if "probe" not in known:
        return None
    others = [peak for phase, peak in known.items() if phase not in ("probe", "load")]
    return max(0, known["probe"] - max(others)) / GIB


def _middle(values: list[float]) -> float | None:
    return median(values) if values else None


def target_table(rows: Rows) -> Table:
    """Goals, the paper's figures and ours."""
    notes = Footnotes()
    raw, display = [], []
    for goal in targets(rows):
        reached = goal.reached(goal.measured)
        raw.append(
            {
                "name": goal.name,
                "unit": goal.unit.strip() or "ratio",
                "better": goal.better,
                "paper": goal.paper,
                "parity": goal.parity,
                "good": goal.good,
                "best": goal.best,
                "forecast": goal.forecast,
                "measured": goal.measured,
                "measured_why": None if goal.measured is not None else NOT_MEASURED,
                "reached": reached,
            }
        )
        shown = {key: _shown(goal, getattr(goal, key)) for key in ("paper", "parity", "good", "best", "forecast")}
        if goal.forecast is not None:
            shown["forecast"] += f" ({goal.reached(goal.forecast)})"
        measured = NOT_MEASURED if goal.measured is None else _shown(goal, goal.measured)
        display.append({"goal": goal.name, **shown, "measured": measured, "reached": reached or UNKNOWN})
    notes.add(f"All on {MAIN} where no model is named. A forecast reaches no goal: in brackets is what it would reach.")
    notes.add(
        "The paper's figures are from secondary readings; its settings are taken to be `plain`, and its probing share "
        "is the middle of 2 to 6 %."
    )
    if any(row.forecast_stale for row in rows):
        notes.add(f"Among the forecasts some are {OTHER_CODE} The table of peak memory marks them.")
    notes.add("Ratios are between equal settings. Goals in GiB are not divided by the paper's: those are of others.")
    return sheet("targets", "Goals set before measuring, the paper's figures, and ours.", raw, display, notes)


def _shown(goal: Target, value: float | None) -> str:
    return UNKNOWN if value is None else number(value, goal.digits) + goal.unit
