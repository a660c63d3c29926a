"""Tables by their names: ours beside the published numbers of the same table, with the evidence of every row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import stdev
from typing import Any

import pandas as pd
from pandas import DataFrame

from harness.reporting.frames import Frames
from harness.reporting.layout import method_name, of_method, other_outcomes
from harness.reporting.paired import paired_on
from harness.reporting.published import Metric, Number, Published
from harness.reporting.quantities import QUANTITIES, values
from harness.reporting.run_tables import elsewhere
from harness.reporting.stats import Difference, detectable
from harness.reporting.table import UNKNOWN, Footnotes, Table, number, signed
from harness.study.spec import Study
from harness.study.views import View, ViewColumn

PAPER = "paper"
"""Before a published number in a cell."""
_PUBLISHED: dict[str, Metric] = {
    "accuracy": "accuracy", "accuracy_sd": "accuracy_sd", "peak_memory": "peak_memory",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Cell:
    title: str
    column: ViewColumn
    model: str
    method: str
    task: str
    runs: DataFrame
    """All runs of the model, task and method."""
    ours: list[float]
    """In the stored unit, one an ok run that has the value."""
    theirs: Number | None


def view_table(frames: Frames, study: Study, label: str, published: Published | None) -> Table:
    """One view of a study: csv with a row a cell, else a row a method."""
    view, notes = study.views[label], Footnotes()
    strange = {} if published is None else published.stand_ins(frames)
    raw: list[dict[str, Any]] = []
    display: list[dict[str, str]] = []
    for model in _blocks(view, study):
        above: list[_Cell] | None = None
        for method in view.methods or study.methods:
            cells = list(_cells(frames, view, model, method, published))
            known = next((cell for cell in cells if cell.ours), None)
            shown = {} if model is None else {"model": model}
            shown["method"] = method_name(study, frames, method, notes)
            for cell in cells:
                raw.append({"table": label} | _numbers(cell))
                shown[cell.title] = _text(cell, notes)
            shown["evidence"] = UNKNOWN if known is None else _evidence(frames, cells, above, notes)
            if known is not None and (sizes := strange.get(known.model)):
                shown["evidence"] += "; stand-in" + notes.mark(
                    f"not the paper's model: {sizes}; this contradicts nothing."
                )
            display.append(shown)
            above = cells if known is not None else above
    units = dict.fromkeys(QUANTITIES[column.metric or view.metric].unit for column in view.columns.values())
    return Table(
        name=label,
        caption=f"{view.title}: mean ± sample standard deviation over seeds (number of ok runs); {', '.join(units)}."
        + _beside(view, published),
        raw=DataFrame(raw),
        display=DataFrame(display),
        footnotes=notes.lines(),
    )


def _beside(view: View, published: Published | None) -> str:
    if view.paper is None or published is None:
        return ""
    return f" Behind “{PAPER}”: {published.title}, {view.paper}. A row without a run stays empty."


def _blocks(view: View, study: Study) -> Sequence[str | None]:
    if all(column.model is not None for column in view.columns.values()):
        return (None,)
    return view.models or tuple(study.models)


def _cells(frames: Frames, view: View, model: str | None, method: str, published: Published | None) -> Iterator[_Cell]:
    for title, column in view.cells():
        of_model, task, metric = column.model or model, column.task, column.metric
        assert of_model is not None
        assert task is not None
        assert metric is not None
        theirs = None
        if published is not None and view.paper is not None and metric in _PUBLISHED:
            theirs = published.beside(
                table=view.paper, metric=_PUBLISHED[metric], model=of_model, task=task, method=method,
                suites=column.suites,
            )  # fmt: skip
        ok = of_method(frames.ok_runs(), of_model, task, method)
        yield _Cell(
            title=title, column=column, model=of_model, method=method, task=task,
            runs=of_method(frames.runs, of_model, task, method), ours=values(frames, ok, metric, column.suites),
            theirs=theirs,
        )  # fmt: skip


# ---------------------------------------------------------------- one cell


def _ours(cell: _Cell) -> tuple[float | None, float | None]:
    """What is shown of our runs, and the spread beside it, in the shown unit."""
    assert cell.column.metric is not None
    quantity = QUANTITIES[cell.column.metric]
    if len(cell.ours) < quantity.least_runs:
        return None, None
    spread = stdev(cell.ours) if quantity.spread and len(cell.ours) > 1 else None
    return quantity.factor * quantity.mean(cell.ours), None if spread is None else quantity.factor * spread


def _numbers(cell: _Cell) -> dict[str, Any]:
    (ours, spread), theirs = _ours(cell), cell.theirs
    inside = None
    if ours is not None and theirs is not None:
        inside = ours > theirs.value if theirs.bound == "above" else abs(ours - theirs.value) <= theirs.tolerance
    return {
        "model": cell.model, "method": cell.method, "task": cell.task, "column": cell.title,
        "metric": cell.column.metric, "suites": " ".join(cell.column.suites), "measured": ours, "sd": spread,
        "ok_runs": len(cell.ours), "published": None if theirs is None else theirs.value,
        "published_source": None if theirs is None else theirs.source,
        "tolerance": None if theirs is None else theirs.tolerance, "within_tolerance": inside,
    }  # fmt: skip


def _text(cell: _Cell, notes: Footnotes) -> str:
    assert cell.column.metric is not None
    quantity = QUANTITIES[cell.column.metric]
    (ours, spread), outcomes = _ours(cell), other_outcomes(cell.runs, notes)
    if ours is None:
        why = "one run has no standard deviation." if cell.ours else "ran, but has no such value."
        text = f"{UNKNOWN} ({outcomes})" if outcomes else UNKNOWN + (notes.mark(why) if len(cell.runs) else "")
    else:
        text = number(ours, quantity.digits)
        text += "" if spread is None else f" ± {number(spread, quantity.digits)}"
        text += f" ({len(cell.ours)})" + (f"; {outcomes}" if outcomes else "")
    if cell.theirs is None:
        return text
    above = "> " if cell.theirs.bound == "above" else ""
    mark = notes.mark(cell.theirs.note) if cell.theirs.note else ""
    return f"{text}; {PAPER} {above}{number(cell.theirs.value, quantity.digits)}{mark}"


# ---------------------------------------------------------------- evidence


def _evidence(frames: Frames, cells: list[_Cell], above: list[_Cell] | None, notes: Footnotes) -> str:
    """Seeds and items of the row's widest column, its difference from the row above, and what the row breaks."""
    widest = max(range(len(cells)), key=lambda i: (len(cells[i].column.suites), bool(cells[i].ours)))
    cell, rival = cells[widest], None if above is None else above[widest]
    seeds = f"{len(cell.ours)} seed{'s' * (len(cell.ours) != 1)}"
    parts = [seeds]
    suites = cell.column.suites
    if suites and cell.column.metric == "accuracy":
        items = frames.scores[frames.scores["run"].isin(list(cell.runs["run"])) & frames.scores["suite"].isin(suites)]
        parts = [f"{seeds} × {int(items.groupby('suite')['rows'].max().sum()):,} items"]
        if rival is not None and rival.ours:
            pair, at = (cell.method, rival.method), (cell.model, cell.task)
            parts.append(_against(paired_on(frames, at, pair, suites), rival.method, notes))
        parts += _broken_by_scores(items, notes)
    return "; ".join([*parts, *_broken_by_runs(frames, cell.runs, notes)])


def _against(found: Difference, rival: str, notes: Footnotes) -> str:
    if found.mean is None:
        return f"not paired with {rival}"
    mark = notes.mark(
        "difference from the last row above that ran, in points, paired by seed and item, every suite weighing the "
        "same; p is the larger of the bootstrap's and the t test's, not corrected; in brackets the difference that "
        "as many seeds and items would have shown in 80 % of cases."
    )
    least = detectable(found)
    known = UNKNOWN if found.p is None else f"{found.p:.2g}"
    return (
        f"{signed(100 * found.mean, 2)} to {rival}, p = {known}{mark}"
        f" [{UNKNOWN if least is None else number(100 * least, 2)}]"
    )


def _broken_by_scores(scores: DataFrame, notes: Footnotes) -> list[str]:
    said = []
    if bool(scores["limited"].fillna(False).any()):
        said.append("limited" + notes.mark("not the whole test file was scored."))
    leaked = scores.groupby("suite")[["leaked_rows", "rows"]].max().fillna(0).sum()
    if leaked["leaked_rows"]:
        share = f"{int(leaked['leaked_rows']):,} of {int(leaked['rows']):,} items"
        said.append("leaked" + notes.mark(f"{share} occur word for word in the training rows."))
    return said


def _broken_by_runs(frames: Frames, runs: DataFrame, notes: Footnotes) -> list[str]:
    ok = runs[runs["status"] == "ok"]
    said = []
    for column, word, why in (
        ("stale", "stale", "made by code that has changed since."),
        ("git_dirty", "uncommitted", "made by code with changes that were not committed."),
    ):
        if bool(ok[column].astype("boolean").fillna(False).any()):
            said.append(word + notes.mark(why))
    machines = elsewhere(frames.runs)
    if other := {machines[run] for run in ok["run"] if run in machines}:
        said.append("other hardware" + notes.mark(f"made on {', '.join(sorted(other))}, unlike most runs here."))
    if len(ok) and pd.isna(ok["lr"]).all():
        said.append("untrained")
    return said
