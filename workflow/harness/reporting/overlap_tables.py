"""Test items that occur in training rows: how many, and what accuracy is without them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pandas import DataFrame

from harness.reporting.frames import Frames
from harness.reporting.layout import cells, method_name, of_method
from harness.reporting.record_rows import KINDS_OF_OVERLAP
from harness.reporting.stats import summarise
from harness.reporting.table import UNKNOWN, Footnotes, Table, number, percent, table_of_rows
from harness.study.spec import Study

_MEANING = (
    "exact: the same question, up to case and punctuation; numbers masked: the same with every number left out; "
    "13-gram: 13 words in a row of the question stand in a training row, in its question or its answer (shorter "
    "questions have none)."
)


def overlap_tables(frames: Frames, study: Study) -> list[Table]:
    """How many items occur, and, where any does, accuracy with and without them."""
    if frames.overlaps.empty:
        return []
    return [_counted(frames), *([] if frames.overlapping.empty else [_without(frames, study)])]


def _counted(frames: Frames) -> Table:
    notes, display = Footnotes(), []
    raw: list[dict[str, Any]] = [dict(row) for row in frames.overlaps.to_dict("records")]  # type: ignore[arg-type]
    for row in raw:
        shown = {"task": row["task"], "suite": row["suite"], "items": f"{row['items']:,}"}
        shown["training rows"] = f"{row['train_rows']:,}"
        for kind, title in zip(KINDS_OF_OVERLAP, ("exact", "numbers masked", "13-gram"), strict=True):
            shown[title] = f"{row[kind]:,} ({percent(row[kind] / row['items'])})"
        display.append(shown)
    notes.add(_MEANING)
    notes.add("Which items: overlapping.parquet, by their number in the suite.")
    return table_of_rows("contamination", "Test items that occur in the training rows.", raw, display, notes)


def _without(frames: Frames, study: Study) -> Table:
    notes, raw, display = Footnotes(), [], []
    for model in study.models:
        for method in study.methods:
            for task, suite, shared in _shared(frames, study):
                runs = of_method(frames.ok_runs(), model, task, method)
                numbers = _accuracies(frames, list(runs["run"]), suite, shared)
                if not numbers["ok_runs"]:
                    continue
                keys = {"model": model, "task": task, "suite": suite, "method": method}
                raw.append(keys | numbers)
                shown = keys | {"method": method_name(study, frames, method, notes)}
                shown |= {title: _points(numbers[key]) for title, key in _COLUMNS.items()}
                display.append(shown | {"items left": f"{numbers['items_left']:,}", "runs": str(numbers["ok_runs"])})
    notes.add(_MEANING)
    return table_of_rows(
        "clean_accuracy",
        "Accuracy with and without the test items that occur in the training rows by any of the three rules, %; mean "
        "over the ok runs. Suites without such items are left out.",
        raw, display, notes,
    )  # fmt: skip


_COLUMNS = {"all items": "accuracy_all", "without them": "accuracy_without", "them alone": "accuracy_of_shared"}


def _shared(frames: Frames, study: Study) -> Iterator[tuple[str, str, set[int]]]:
    for task, suite in cells(study, "written", "likelihood"):
        rows = frames.overlapping[(frames.overlapping["task"] == task) & (frames.overlapping["suite"] == suite)]
        if len(rows):
            yield task, suite, set(map(int, rows["document"]))


def _accuracies(frames: Frames, runs: list[str], suite: str, shared: set[int]) -> dict[str, Any]:
    documents = frames.documents[frames.documents["run"].isin(runs) & (frames.documents["suite"] == suite)]
    inside = documents["document"].isin(list(shared))
    parts = {"all": documents, "without": documents[~inside], "of_shared": documents[inside]}
    found: dict[str, Any] = {f"accuracy_{name}": _mean(part) for name, part in parts.items()}
    left = parts["without"]
    return found | {
        "items_left": int(left["document"].nunique()), "ok_runs": int(documents["run"].nunique()),
    }  # fmt: skip


def _mean(documents: DataFrame) -> float | None:
    return summarise([float(value) for value in documents.groupby("run")["correct"].mean().dropna()]).mean


def _points(share: float | None) -> str:
    return UNKNOWN if share is None else number(100 * share, 1)
