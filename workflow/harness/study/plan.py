"""A study resolved into jobs, their specs on disk, and the state each is in. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from harness.records import atomic
from harness.study.config import dagger, load_study, method_of, recipe_of
from harness.study.paths import Places
from harness.study.spec import (
    EvalJob,
    FitJob,
    Job,
    ModelJob,
    PretrainedHere,
    RowsJob,
    RunJob,
    SearchJob,
    Study,
    SuiteJob,
    Training,
)

State = Literal["done", "stale", "to do"]


@dataclass(frozen=True)
class Plan:
    """Every job of one study, by name."""

    study: Study
    models: dict[str, ModelJob]
    rows: dict[str, RowsJob]
    suites: dict[str, SuiteJob]
    searches: dict[str, SearchJob]
    forecasts: dict[str, FitJob]
    """Of the runs on a GPU; on a CPU there is no device memory to fit."""
    runs: dict[str, RunJob]
    evals: dict[str, EvalJob]
    eval_of: dict[str, str]
    """Name of the evaluation that scores each run."""

    @property
    def pretrained(self) -> list[str]:
        """Models that this study pretrains itself."""
        return [name for name, job in self.models.items() if isinstance(job.source, PretrainedHere)]


def open_study(path: Path, places: Places, *, dry_run: bool = False) -> Plan:
    """Load a study, resolve it, and write the specs that are not there yet.

    A dry run writes nothing and does not need the input files: a study can be looked at before its data is fetched.

    Raises:
        harness.study.strict_yaml.ConfigError: anything wrong with the file, in one line.
    """
    plan = resolve_study(load_study(path, inputs_needed=not dry_run))
    if not dry_run:
        write_specs(plan, places)
    return plan


def resolve_study(study: Study) -> Plan:
    """The grid models x tasks x methods x seeds, and what those runs need."""
    plan = Plan(study, {}, {}, {}, {}, {}, {}, {}, {})
    for model_label, source in study.models.items():
        model = ModelJob(label=model_label, source=source)
        plan.models[model.name] = model
        for task_label, task in study.tasks.items():
            rows = RowsJob(label=task_label, source=task.train)
            plan.rows[rows.name] = rows
            suites = tuple(SuiteJob(label=label, source=suite) for label, suite in task.suites.items())
            plan.suites.update({suite.name: suite for suite in suites})
            for method_label in study.methods:
                _add_runs(plan, study, model, rows, suites, method_label)
    return plan


def _add_runs(
    plan: Plan, study: Study, model: ModelJob, rows: RowsJob, suites: tuple[SuiteJob, ...], label: str
) -> None:
    entry = study.methods[label]
    recipe = recipe_of(study, rows.label, label)
    method, options = method_of(study, label)
    searched = method.TRAINS and entry.lr is None
    training = Training(
        model=model,
        rows=rows,
        label=label,
        module=entry.module,
        options=options,
        recipe=recipe,
        recipe_changes=tuple(dagger(study, label)),
    )
    fit = fit_job(training)
    if fit is not None:
        plan.forecasts[fit.name] = fit
    evaluation = EvalJob(task=rows.label, suites=suites, max_length=recipe.max_length)
    plan.evals[evaluation.name] = evaluation
    for seed in entry.seeds or study.seeds:
        run = RunJob(
            training=training,
            lr=entry.lr,
            search=study.search if searched else None,
            seed=seed,
            observation=study.observation,
        )
        plan.runs[run.name] = run
        plan.eval_of[run.name] = evaluation.name
        search = run.search_job()
        if search is not None:
            plan.searches[search.name] = search


def fit_job(training: Training) -> FitJob | None:
    """The forecast that a run waits for; None on a CPU."""
    return FitJob(training=training) if training.recipe.device == "cuda" else None


def write_specs(plan: Plan, places: Places) -> None:
    """Write each job's resolved spec where it is absent; what is there is never touched."""
    wanted: list[tuple[Path, Job]] = []
    wanted += [(places.model(name) / "spec.json", job) for name, job in plan.models.items()]
    wanted += [(places.rows(name) / "spec.json", job) for name, job in plan.rows.items()]
    wanted += [(places.suite(name) / "spec.json", job) for name, job in plan.suites.items()]
    wanted += [(places.search(name) / "spec.json", job) for name, job in plan.searches.items()]
    wanted += [(places.forecast(name) / "spec.json", job) for name, job in plan.forecasts.items()]
    wanted += [(places.run(name) / "spec.json", job) for name, job in plan.runs.items()]
    wanted += [(places.eval_spec(name), job) for name, job in plan.evals.items()]
    for path, job in wanted:
        if not path.exists():
            atomic.write_json(path, job.body())


@dataclass(frozen=True)
class Output:
    """A file that one job declares, and how long such a job takes compared with others."""

    path: Path
    kind: str
    name: str
    weight: float
    """Optimizer steps the job makes, or as many as take about its time; for progress and time left."""


START_WEIGHT = 120.0
"""Start of a job that imports torch and transformers, in optimizer steps of the embedded model."""


def outputs(plan: Plan, places: Places) -> list[Output]:
    """Every declared output of the jobs before `collect`."""
    found: list[Output] = []
    for name, model in plan.models.items():
        weight = 4.0 * model.source.steps if isinstance(model.source, PretrainedHere) else START_WEIGHT
        found.append(Output(places.model(name) / "manifest.json", "model", name, weight))
    found += [Output(places.rows(name) / "manifest.json", "rows", name, 20.0) for name in plan.rows]
    found += [Output(places.suite(name) / "manifest.json", "suite", name, 20.0) for name in plan.suites]
    for name in plan.forecasts:
        found.append(Output(places.forecast(name) / "forecast.json", "forecast", name, START_WEIGHT))
    for name, search in plan.searches.items():
        trials = len(search.search.grid) * len(search.search.seeds)
        weight = START_WEIGHT + trials * search.training.recipe.steps
        found.append(Output(places.search(name) / "search.json", "search", name, weight))
    for name, run in plan.runs.items():
        weight = START_WEIGHT + run.training.recipe.steps
        found.append(Output(places.run(name) / "train.json", "train", name, weight))
        found.append(Output(places.score(name, plan.eval_of[name]), "evaluate", name, 1.2 * START_WEIGHT))
    return found


def folder_bytes(paths: Iterable[Path]) -> int:
    """Size on disk of files and folders."""
    total = 0
    for path in paths:
        files = path.rglob("*") if path.is_dir() else [path]
        total += sum(file.stat().st_size for file in files if file.is_file())
    return total
