"""Rows and columns of every table, in the order of the config, and the names of methods in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal

import numpy as np
from pandas import DataFrame

from harness.reporting.frames import Frames
from harness.reporting.table import Footnotes
from harness.study.sources import LmEvalSuite, ReadSuite, SuiteSource
from harness.study.spec import UNTRAINED, Study

SUBJECT = "grass"
"""Label of the method that the paired differences are about."""
REFERENCE = "full"
"""Module of full fine-tuning, the base of the throughput ratios and of the importance figures."""


VALIDATION = "validation"
"""Stands in tables of the loss where a task has no suite."""

Protocol = Literal["written", "likelihood", "lm-eval"]
"""What a suite's score rests on: a rule reads what the model writes; the likeliest allowed answer; lm-eval's own."""


def trained(study: Study) -> list[str]:
    """Every method but the untrained model."""
    return [method for method, entry in study.methods.items() if entry.module != UNTRAINED]


def part(study: Study, comparison: str) -> Study:
    """The study with the methods of one comparison alone, in the comparison's order."""
    chosen = {label: study.methods[label] for label in study.comparisons[comparison].methods}
    return study.model_copy(update={"methods": chosen, "comparisons": {}})


def cells(study: Study, *protocols: Protocol) -> list[tuple[str, str]]:
    """(task, suite) of the suites that are scored by one of these protocols, in the order of the config."""
    return [
        (task, label)
        for task, entry in study.tasks.items()
        for label, source in entry.suites.items()
        if protocol_of(source) in protocols
    ]


def protocol(study: Study, task: str, suite: str) -> Protocol:
    """How a suite of a task is scored; numbers of different protocols never share a column.

    The validation rows of a task without suites count as `written`: their loss is of the outputs that training writes.
    """
    return "written" if suite == VALIDATION else protocol_of(study.tasks[task].suites[suite])


def protocol_of(source: SuiteSource) -> Protocol:
    """How a suite is scored."""
    if isinstance(source, LmEvalSuite):
        return "lm-eval"
    return "likelihood" if source.scoring == "likelihood" else "written"


def loss_cells(study: Study) -> list[tuple[str, str]]:
    """(task, suite) with a held-out loss; `VALIDATION` stands for the suites of a task that has none."""
    asked_otherwise = {
        (task, label)
        for task, entry in study.tasks.items()
        for label, source in entry.suites.items()
        if isinstance(source, ReadSuite) and source.choices == "texts"
    }
    scored = [cell for cell in cells(study, "written", "likelihood") if cell not in asked_otherwise]
    without = [(task, VALIDATION) for task, entry in study.tasks.items() if not entry.suites]
    order = list(study.tasks)
    return sorted([*scored, *without], key=lambda cell: order.index(cell[0]))


def losses_on_validation(frames: Frames, study: Study) -> DataFrame:
    """Scores of the suite `VALIDATION`: the ok runs' loss on the validation rows of tasks without suites."""
    runs = frames.ok_runs()
    known = runs[runs["task"].isin([task for task, suite in loss_cells(study) if suite == VALIDATION])]
    return known[["run", "model", "task", "method", "seed"]].assign(
        suite=VALIDATION, heldout_loss=known["validation_loss"]
    )


def groups(study: Study) -> Iterator[tuple[str, str]]:
    """(model, task) in the order of the config."""
    for model in study.models:
        for task in study.tasks:
            yield model, task


def of_method(runs: DataFrame, model: str, task: str, method: str) -> DataFrame:
    """Rows of one model, task and method, by seed."""
    chosen = (runs["model"] == model) & (runs["task"] == task) & (runs["method"] == method)
    places = np.flatnonzero(chosen.to_numpy(dtype=bool, na_value=False))
    by_seed = runs["seed"].iloc[places].to_numpy().argsort(kind="stable")
    # rows are copied once, with their hundred columns: this is called hundreds of times
    return runs.iloc[places[by_seed]]


def method_name(study: Study, frames: Frames, method: str, notes: Footnotes) -> str:
    """The label, with a dagger if the method departs from the study's recipe."""
    changed = frames.runs.loc[frames.runs["method"] == method, "recipe_changes"].dropna()
    shots = study.methods[method].shots
    if shots:
        notes.add(
            f"{method}: {shots} worked examples, the first training rows of the task, stand before every question of "
            "the task's suites, but for tasks of lm-eval and the likelihood of options' texts; the held-out loss is "
            "without them."
        )
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
    for row in runs.loc[runs["status"] != "ok", ["status", "status_why", "failed_checks"]].to_dict("records"):
        status = str(row["status"])
        counted[status] += 1
        reasons.setdefault(status, set()).add(why(row["status_why"], row["failed_checks"]))
    return ", ".join(f"{n} {s}{notes.mark(f'{s}: ' + '; '.join(sorted(reasons[s])))}" for s, n in counted.items())


def why(*texts: object) -> str:
    """The first reason that was recorded."""
    return next((text for text in texts if isinstance(text, str) and text), "no reason was recorded")
