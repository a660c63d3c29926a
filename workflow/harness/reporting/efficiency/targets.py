"""The study's goals, set before anything was measured, and how far the methods reached them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from harness.efficiency.arithmetic import mean_step_s
from harness.efficiency.goals import Goal, MemoryRatio, Overhead, Peak, ProbePeak, ProbeShare, SpeedRatio
from harness.records.units import GIB
from harness.reporting.efficiency.memory_table import NOT_MEASURED, OTHER_CODE
from harness.reporting.efficiency.rows import Row, Rows, Source, ratio
from harness.reporting.stats import median_or_none
from harness.reporting.table import UNKNOWN, Footnotes, Table, number, table_of_rows


@dataclass(frozen=True, kw_only=True)
class Target:
    """One goal, and our figures for it."""

    goal: Goal
    name: str
    measured: float | None
    forecast: float | None = None
    in_gib: bool = False
    """Whether the target is in GiB; else it is a ratio."""

    def shown(self, value: float | None) -> str:
        """A value in this target's unit."""
        if value is None:
            return UNKNOWN
        return f"{number(value, 2)} GiB" if self.in_gib else number(value, 3)


def targets(rows: Rows) -> list[Target]:
    """Every goal of the study with our figures for it."""
    return [_target(goal, rows) for goal in rows.study.targets]


def _target(goal: Goal, rows: Rows) -> Target:
    model, where = rows.study.model_of(goal), f"{goal.settings} {goal.shape}"
    row = rows.get(model, goal.settings, goal.shape, goal.method)
    elsewhere = "" if model == rows.study.anchor.cuda else f" on {model}"

    def other(method: str) -> Row | None:
        return None if row is None else rows.beside(row, method)

    match goal:
        case MemoryRatio():
            return Target(
                goal=goal,
                name=f"peak memory of {goal.method} to {goal.against}{elsewhere}, {where}",
                measured=_memory_ratio(row, other(goal.against), "measured"),
                forecast=_memory_ratio(row, other(goal.against), "forecast"),
            )
        case Peak():
            return Target(
                goal=goal,
                name=f"peak memory of {goal.method} on {model}, {where}",
                measured=_peak_gib(row, "measured"),
                forecast=_peak_gib(row, "forecast"),
                in_gib=True,
            )
        case SpeedRatio():
            return Target(
                goal=goal,
                name=f"tokens/s of {goal.method} to {goal.against}{elsewhere}, {where}",
                measured=None if row is None else median_or_none(row.speed_ratios(other(goal.against))),
            )
        case Overhead():
            shares = [] if row is None else [1 - share for share in row.speed_ratios(rows.resident(row))]
            return Target(
                goal=goal,
                name=f"tokens/s lost by moving moments, {goal.method}{elsewhere}, {where}",
                measured=median_or_none(shares),
            )
        case ProbeShare():
            return Target(
                goal=goal,
                name=f"time of one probing batch every {goal.every_steps} steps, {goal.method}{elsewhere}, {where}",
                measured=None if row is None else _probe_share(row, goal.every_steps),
            )
        case ProbePeak():
            memory = None if row is None or row.measured is None else row.measured.memory
            forecast = None if row is None or row.forecast is None else row.forecast.by_phase_bytes
            return Target(
                goal=goal,
                name=f"memory of probing beyond the step's peak, {goal.method}{elsewhere}, {where}",
                measured=_probe_gib(None if memory is None else memory.device_allocated_peak_bytes),
                forecast=_probe_gib(forecast),
                in_gib=True,
            )


def _memory_ratio(row: Row | None, other: Row | None, source: Source) -> float | None:
    return None if row is None or other is None else ratio(row.peak(source), other.peak(source))


def _peak_gib(row: Row | None, source: Source) -> float | None:
    figure = None if row is None else row.peak(source)
    return None if figure is None else figure.value / GIB


def _probe_share(row: Row, every_steps: int) -> float | None:
    return median_or_none(
        block.probe_s / block.probe_batches / (every_steps * mean_step_s(block.step_s, block.own_period_steps))
        for block in row.blocks
        if block.probe_s is not None
    )


def _probe_gib(by_phase: Mapping[str, int | None] | None) -> float | None:
    """GiB of the probe's peak beyond that of all other phases of a step."""
    known = {phase: peak for phase, peak in (by_phase or {}).items() if peak is not None}
    if "probe" not in known:
        return None
    others = [peak for phase, peak in known.items() if phase not in ("probe", "load")]
    return max(0, known["probe"] - max(others)) / GIB


def target_table(rows: Rows) -> Table:
    """Goals, the paper's figures and ours."""
    notes = Footnotes()
    raw, display = [], []
    for target in targets(rows):
        goal, reached = target.goal, target.goal.reached(target.measured)
        raw.append(
            {
                "name": target.name,
                "unit": "GiB" if target.in_gib else "ratio",
                "better": goal.better,
                "paper": goal.paper,
                "parity": goal.parity,
                "good": goal.good,
                "best": goal.best,
                "forecast": target.forecast,
                "measured": target.measured,
                "measured_why": None if target.measured is not None else NOT_MEASURED,
                "reached": reached,
            }
        )
        shown = {key: target.shown(getattr(goal, key)) for key in ("paper", "parity", "good", "best")}
        forecast = target.shown(target.forecast)
        if target.forecast is not None:
            forecast += f" ({goal.reached(target.forecast)})"
        measured = NOT_MEASURED if target.measured is None else target.shown(target.measured)
        display.append(
            {"goal": target.name, **shown, "forecast": forecast, "measured": measured, "reached": reached or UNKNOWN}
        )
    notes.add(
        f"All on {rows.study.anchor.cuda} where no model is named. A forecast reaches no goal: in brackets is what it "
        "would reach."
    )
    for text in rows.study.target_notes:
        notes.add(text)
    if any(row.forecast_stale for row in rows):
        notes.add(f"Some figures are {OTHER_CODE} The table of peak memory marks them.")
    notes.add("Ratios are between equal settings. Goals in GiB are not divided by the paper's: those are of others.")
    return table_of_rows("targets", "Goals set before measuring, the paper's figures, and ours.", raw, display, notes)
