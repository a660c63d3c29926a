"""Tables by their names, such as a paper's: rows, columns, averages and the published numbers beside ours."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Literal

from pydantic import Field

from baselines.method import Strict
from harness.study.labels import Label

FigureKind = Literal[
    "results", "accuracy-and-memory", "learning-rates", "loss", "importance", "agreement", "efficiency", "probe-norms",
    "probe-blocks", "probe-correlations", "drift",
]  # fmt: skip
"""What a figure shows; its name goes on with what it is of."""
Quantity = Literal["accuracy", "accuracy_sd", "heldout_loss", "validation_loss", "peak_memory", "throughput"]


class ViewColumn(Strict):
    """One column of a view."""

    suites: tuple[Label, ...] = Field(default=(), description="of the task; more than one: the plain mean over them")
    metric: Quantity | None = Field(default=None, description="null takes the view's")
    task: Label | None = Field(default=None, description="null takes the view's")
    model: Label | None = Field(default=None, description="null: every model of the view has rows of its own")


class View(Strict):
    """One table: a row a method, beside the published numbers of the same table."""

    title: str
    paper: str | None = Field(default=None, description="`table` of those published numbers that stand beside ours")
    metric: Quantity = "accuracy"
    task: Label | None = None
    models: tuple[Label, ...] = Field(default=(), description="none: all of the study")
    methods: tuple[Label, ...] = Field(default=(), description="rows in their order; none: all of the study")
    columns: dict[str, ViewColumn] = Field(min_length=1)

    def cells(self) -> Iterator[tuple[str, ViewColumn]]:
        """The columns by title, with metric and task filled in."""
        for title, column in self.columns.items():
            own = {"metric": column.metric or self.metric, "task": column.task or self.task}
            yield title, column.model_copy(update=own)

    def complaint(
        self, *, models: Collection[str], tasks: Mapping[str, Collection[str]], methods: Collection[str]
    ) -> str | None:
        """What does not fit a study, with its key; None if all fits.

        Args:
            models: labels of the study's models.
            tasks: labels of its suites, by task.
            methods: labels of its methods.
        """
        for key, asked, known in (("models", self.models, models), ("methods", self.methods, methods)):
            if unknown := [label for label in asked if label not in known]:
                return f"{key}: the study has no {key[:-1]} {', '.join(unknown)}"
        for title, column in self.cells():
            at = f"columns.{title}"
            if column.model is not None and column.model not in models:
                return f"{at}.model: the study has no model {column.model}"
            if column.task is None:
                return f"{at}.task: say here or for the whole view which task it is of: {', '.join(tasks)}"
            if column.task not in tasks:
                return f"{at}.task: the study has no task {column.task}"
            if unknown := [suite for suite in column.suites if suite not in tasks[column.task]]:
                return f"{at}.suites: task {column.task} has no suite {', '.join(unknown)}"
            of_suites = column.metric in {"accuracy", "accuracy_sd", "heldout_loss"}
            if of_suites != bool(column.suites):
                return f"{at}.suites: {'name them' if of_suites else f'none belong to {column.metric}'}"
        named = {column.model is None for column in self.columns.values()}
        if len(named) > 1:
            return "columns: either all of them name a model or none does"
        return None
