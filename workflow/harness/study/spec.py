"""The study's config as strict models: tasks, methods and how they are compared. Its inputs are in
`harness.study.sources`.

Imports no torch, so a thousand runs are planned in seconds.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from baselines.method import Recipe, Strict, later
from harness.study.labels import Label
from harness.study.sources import LARGEST_SEED, ModelSource, RowSource, SuiteSource
from harness.study.views import FigureKind, View

MOST_RUNS = 10_000
PromptName = Literal["llm-adapters", "alpaca", "plain", "chat"]
UNTRAINED = "base"
"""Module of the untrained model: a row of the tables, but not a rival."""


class Task(Strict):
    """One training set and the suites that are scored after training on it."""

    train: RowSource
    prompt: PromptName = later("llm-adapters", description="how a row becomes text, in training and in scoring")
    suites: dict[Label, SuiteSource] = Field(default_factory=dict, description="none: held-out loss only")
    recipe: dict[str, Any] = Field(default_factory=dict, description="laid over the study's recipe")


class MethodEntry(Strict):
    """One row of the tables: a file in baselines/ with its options."""

    module: str
    options: dict[str, Any] = Field(default_factory=dict)
    recipe: dict[str, Any] = Field(
        default_factory=dict, description="what this method changes outside its own block; shown as a dagger"
    )
    lr: float | None = Field(default=None, gt=0, description="fixed; null takes the study's search")
    seeds: tuple[int, ...] | None = Field(default=None, min_length=1, description="null takes the study's seeds")
    shots: int = Field(
        default=0,
        ge=0,
        description="worked examples, the first training rows of the task, before every test question; not trained so",
    )
    gpus: int | None = Field(default=None, gt=0, description="null takes the study's `runtime.gpus`")
    note: str = ""


class Search(Strict):
    """Learning-rate search, the same for every method: same grid, same seeds, same steps, same rule."""

    grid: tuple[float, ...] = Field(min_length=3)
    seeds: tuple[int, ...] = Field(min_length=1, description="disjoint from the study's seeds")
    max_extensions: int = Field(ge=0, description="points added, one by one, while the best lies at an edge")
    share: float = later(
        1.0,
        gt=0,
        le=1,
        description="of a run's steps and warm-up steps that a trial takes, with the whole schedule in it",
    )


class Observation(Strict):
    """The observer probe: true gradient norms of all layers on fixed validation rows, outside the clock."""

    every_steps: int = Field(gt=0)
    rows: int = Field(gt=0)


class Probes(Strict):
    """Gradient norms of all layers of every model before training, on batches of every task's training rows."""

    batches: int = Field(ge=4, description="measured one by one; half of them against the other half is the noise")
    rows: int = Field(gt=0, description="training rows in a batch")
    seed: int = Field(default=0, ge=0, le=LARGEST_SEED, description="of the order in which rows are taken")


class Runtime(Strict):
    """How runs are carried out. It does not change their results, so it never enters a job's name."""

    threads: int = Field(default=1, gt=0, le=1024, description="torch threads of one job")
    gpus: int = Field(
        default=1,
        gt=0,
        le=1024,
        description="processes that train one run, each on a GPU of its own, with its share of every step's "
        "micro-batches; with device cpu, processes alone",
    )
    checkpoint_every_steps: int = Field(default=100, gt=0, description="resume state is written this often")
    eval_batch_size: int = Field(default=64, gt=0)
    keep: Literal["none", "last", "all"] | None = Field(
        default=None,
        description="exported models that stay on disk once they are scored: none, all, or last, of each method the "
        "one of its last seed; null: none of models above 1 GiB, else all",
    )


class Comparison(Strict):
    """Some of the study's methods side by side, with their own table and figures."""

    title: str
    methods: tuple[Label, ...] = Field(min_length=2, description="the first is what the others are compared with")
    reading: str = Field(description="what the comparison isolates, and what it cannot show")


class Question(Strict):
    """What the study asks of one of its methods; the report answers it first, from the records."""

    ask: str
    method: Label
    controls: dict[Label, str] = Field(
        min_length=1, description="method: what comparing with it isolates; the first one decides the answer"
    )


class Study(Strict):
    """One file under config/: a list of runs."""

    study: Label
    title: str
    notes: tuple[str, ...] = Field(default=(), description="paragraphs shown in the report")
    inputs: dict[str, str] = Field(
        default_factory=dict, description="environment variable that holds a path: what should be there"
    )
    published: str | None = Field(default=None, description="file of published numbers shown beside measured ones")
    claims: str | None = Field(default=None, description="file of a paper's claims, judged by what was measured")
    seeds: tuple[int, ...] = Field(min_length=1)
    models: dict[Label, ModelSource] = Field(min_length=1)
    tasks: dict[Label, Task] = Field(min_length=1)
    methods: dict[Label, MethodEntry] = Field(min_length=1)
    forgetting: dict[Label, SuiteSource] = Field(
        default_factory=dict, description="suites of no task, scored for every run and, before, for the untrained model"
    )
    comparisons: dict[Label, Comparison] = Field(
        default_factory=dict, description="groups of methods with tables and figures of their own"
    )
    question: Question | None = None
    views: dict[Label, View] = Field(default_factory=dict, description="tables by their names, such as a paper's")
    figures: dict[FigureKind, str] = Field(
        default_factory=dict, description="kind of ours: the paper's figure that it measures anew"
    )
    recipe: Recipe
    search: Search | None = None
    observation: Observation
    probes: Probes | None = Field(default=None, description="null: importance before training is not measured")
    runtime: Runtime = Runtime()

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        used = [("seeds", self.seeds)]
        used += [(f"methods.{k}.seeds", m.seeds) for k, m in self.methods.items() if m.seeds]
        if self.search and set(self.search.seeds) & {seed for _, seeds in used for seed in seeds}:
            raise ValueError("search.seeds: must differ from the seeds of all runs, or the search sees the test runs")
        for name, seeds in [*used, *([("search.seeds", self.search.seeds)] if self.search else [])]:
            if len(set(seeds)) != len(seeds) or min(seeds) < 0 or max(seeds) > LARGEST_SEED:
                raise ValueError(f"{name}: must be distinct whole numbers from 0 to {LARGEST_SEED}")
        seeds_of_methods = sum(len(entry.seeds or self.seeds) for entry in self.methods.values())
        if (runs := len(self.models) * len(self.tasks) * seeds_of_methods) > MOST_RUNS:
            raise ValueError(f"{runs} runs are asked for, at most {MOST_RUNS} may be: make several studies of them")
        for label in self.forgetting:
            tasks = [task for task, entry in self.tasks.items() if label in entry.suites]
            if tasks:
                raise ValueError(f"forgetting.{label}: task {tasks[0]} has a suite of this label; call it otherwise")
        if self.forgetting and self.untrained() is None:
            raise ValueError(
                "forgetting: nothing is scored before training: add an entry to `methods`, "
                f"such as `base: {{module: {UNTRAINED}, seeds: [0]}}`"
            )
        for label, comparison in self.comparisons.items():
            unknown = [method for method in comparison.methods if method not in self.methods]
            if unknown:
                raise ValueError(f"comparisons.{label}.methods: the study has no method {', '.join(unknown)}")
            if len(set(comparison.methods)) != len(comparison.methods):
                raise ValueError(f"comparisons.{label}.methods: each method once")
            if label in self.methods:
                raise ValueError(f"comparisons.{label}: a method has this label; call the comparison otherwise")
        if self.question is not None:
            for label in (self.question.method, *self.question.controls):
                if label not in self.methods:
                    raise ValueError(f"question: the study has no method {label}")
            if self.question.method in self.question.controls:
                raise ValueError(f"question.controls: {self.question.method} cannot be compared with itself")
        suites = {task: entry.suites.keys() for task, entry in self.tasks.items()}
        for label, view in self.views.items():
            if why := view.complaint(models=self.models, tasks=suites, methods=self.methods):
                raise ValueError(f"views.{label}.{why}")
        if self.search and (len(set(self.search.grid)) != len(self.search.grid) or min(self.search.grid) <= 0):
            raise ValueError("search.grid: must be distinct rates above 0")
        return self

    def untrained(self) -> str | None:
        """The method whose scores are those before training: of module base, with the fewest shots."""
        entries = [(entry.shots, label) for label, entry in self.methods.items() if entry.module == UNTRAINED]
        return min(entries, key=lambda entry: entry[0])[1] if entries else None
