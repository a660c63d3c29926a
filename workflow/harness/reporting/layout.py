"""Rows and columns of every table, in the order of the config, and the names of methods in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from pandas import DataFrame

from harness.reporting.frames import Frames
from harness.reporting.table import Footnotes
from harness.study.spec import UNTRAINED, Study

SUBJECT = "grass"
"""Label of the method that the paired differences are about."""
REFERENCE = "full"
"""Module of full fine-tuning, the base of the throughput ratios and of the importance figures."""


def trained(study: Study) -> list[str]:
    """Every method but the untrained model."""
    return [method for method, entry in study.methods.items() if entry.module != UNTRAINED]


def part(study: Study, comparison: str) -> Study:
    """The study with the methods of one comparison alone, in the comparison's order."""
    chosen = {label: study.methods[label] for label in study.comparisons[comparison].methods}
    return study.model_copy(update={"methods": chosen, "comparisons": {}})


def cells(study: Study) -> list[tuple[str, str]]:
    """(task, suite) in the order of the config."""
    return [(task, suite) for task, entry in study.tasks.items() for suite in entry.suites]


def groups(study: Study) -> Iterator[tuple[str, str]]:
    """(model, task) in the order of the config."""
    for model in study.models:
        for task in study.tasks:
            yield model, task


def of_method(runs: DataFrame, model: str, task: str, method: str) -> DataFrame:
    """Rows of one model, task and method, by seed."""
    chosen = runs[(runs["model"] == model) & (runs["task"] == task) & (runs["method"] == method)]
    return chosen.sort_values("seed")


def method_name(study: Study, frames: Frames, method: str, notes: Footnotes) -> str:
    """The label, with a dagger if the method departs from the study's recipe."""
    changed = frames.runs.loc[frames.runs["method"] == method, "recipe_changes"].dropna()
    keys = sorted(
        {key for text in changed for key in text.replace(",", " ").split()} | set(study.methods[method].recipe)
    )
    if not keys:
        return method
    notes.add(f"† {method} departs from the study's recipe in: {', '.join(keys)}.")
    return f"{method} †"


def other_outcomes(runs: DataFrame, notes: Footnotes) -> str:
    """Outcomes of the runs that do not count: "1 disengaged^a^, 2 oom^b^"; empty if all are ok."""
    counted: Counter[str] = Counter()
    reasons: dict[str, set[str]] = {}
    for row in runs[runs["status"] != "ok"].to_dict("records"):
        status = str(row["status"])
        counted[status] += 1
        reasons.setdefault(status, set()).add(why(row["status_why"], row["failed_checks"]))
    return ", ".join(f"{n} {s}{notes.mark(f'{s}: ' + '; '.join(sorted(reasons[s])))}" for s, n in counted.items())


def why(*texts: object) -> str:
    """The first reason that was recorded."""
    return next((text for text in texts if isinstance(text, str) and text), "no reason was recorded")
