"""Resolves a study into jobs, and writes their specs to disk. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baselines import find_method
from harness.errors import UserError
from harness.records import atomic
from harness.records.locks import remove_left
from harness.study.config import changed_recipe_keys, load_study, method_of, recipe_of, task_recipe
from harness.study.identity import replaced_models
from harness.study.jobs import (
    EVALUATE,
    KINDS,
    MODEL,
    EvalJob,
    ForecastJob,
    J,
    Job,
    Kind,
    ModelJob,
    OverlapJob,
    ProbeJob,
    RowsJob,
    RunJob,
    SearchJob,
    SuiteJob,
    Training,
)
from harness.study.paths import Paths, mirrored, missing_in_mirror, resolve
from harness.study.sources import HubModel, LmEvalSuite, PretrainedHere, SuiteSource
from harness.study.spec import UNTRAINED, Probes, Study


@dataclass(frozen=True)
class Plan:
    """Every job of one study, by name."""

    study: Study
    models: dict[str, ModelJob]
    rows: dict[str, RowsJob]
    suites: dict[str, SuiteJob]
    overlaps: dict[str, OverlapJob]
    """One a task with suites whose rows are known."""
    probes: dict[str, ProbeJob]
    """None if the study asks for no probes."""
    searches: dict[str, SearchJob]
    forecasts: dict[str, ForecastJob]
    """Forecasts for the runs on a GPU; on a CPU there is no device memory to forecast."""
    runs: dict[str, RunJob]
    evals: dict[str, EvalJob]
    evaluation_of: dict[str, str]
    """Name of the evaluation that scores each run; runs of a task without suites are not in it."""

    def jobs(self, kind: Kind[J]) -> dict[str, J]:
        """All jobs of one kind, by name."""
        found: dict[str, J] = getattr(self, kind.plural)
        return found

    @property
    def pretrained(self) -> list[str]:
        """Models that this study pretrains itself."""
        return [name for name, job in self.models.items() if isinstance(job.source, PretrainedHere)]


def open_study(path: Path, paths: Paths, *, dry_run: bool = False) -> Plan:
    """Load a study, resolve it, write the specs that are not there yet, and remove locks that killed jobs left.

    A dry run writes nothing and does not need the input files: a study can be inspected before its data is fetched.

    Raises:
        harness.study.strict_yaml.ConfigError: the file is invalid; the message is one line.
        UserError: a model's folder holds another model than the one that records were made from, or the mirror lacks
            one.
    """
    plan = resolve_study(load_study(path, inputs_needed=not dry_run))
    for message in replaced_models((paths.output(MODEL, name) for name in plan.models), dry_run=dry_run).values():
        raise UserError(message)
    if not dry_run:
        _check_mirror(plan, paths, config=path)
        write_specs(plan, paths)
        report = paths.study(plan.study.study)
        of_report = [report / name for name in ("tables", "figures.json", "report.html")]
        for file in [*(output.path for output in outputs(plan, paths)), *of_report]:
            remove_left(file)
    return plan


def reopen_study(path: Path) -> Plan:
    """The plan of a study that is under way, for one of its jobs: nothing is checked or written again."""
    return resolve_study(load_study(path, inputs_needed=False))


def _check_mirror(plan: Plan, paths: Paths, *, config: Path) -> None:
    """Refuse a mirror folder that lacks a model which is still to be found, before anything is made."""
    for name, job in plan.models.items():
        text = mirrored(job.source.repo) if isinstance(job.source, HubModel) else None
        if text is not None and not paths.output(MODEL, name).is_file() and not resolve(text).is_dir():
            assert isinstance(job.source, HubModel)
            raise UserError(f"{config}: models.{job.label}: {missing_in_mirror(job.source.repo)}")


def resolve_study(study: Study) -> Plan:
    """The grid models x tasks x methods x seeds, and the jobs that those runs depend on."""
    plan = Plan(study, {}, {}, {}, {}, {}, {}, {}, {}, {}, {})
    for model_label, source in study.models.items():
        model = ModelJob(label=model_label, source=source)
        plan.models[model.name] = model
        for task_label, task in study.tasks.items():
            rows = RowsJob(label=task_label, source=task.train)
            plan.rows[rows.name] = rows
            compared = _suite_jobs(
                {
                    label: suite
                    for label, suite in {**task.suites, **study.forgetting}.items()
                    if not isinstance(suite, LmEvalSuite)
                }
            )
            if compared:
                overlap = OverlapJob(rows=rows, suites=compared)
                plan.overlaps[overlap.name] = overlap
            if study.probes is not None:
                probe = probe_job(study, model, rows, study.probes)
                plan.probes[probe.name] = probe
            for method_label in study.methods:
                _add_runs(plan, study, model, rows, method_label)
    return plan


def _add_runs(plan: Plan, study: Study, model: ModelJob, rows: RowsJob, label: str) -> None:
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
        prompt=study.tasks[rows.label].prompt,
        recipe_changes=tuple(changed_recipe_keys(study, label)),
    )
    _check_processes(study, training)
    forecast = forecast_job(training)
    if forecast is not None:
        plan.forecasts[forecast.name] = forecast
    evaluation = _evaluation(study, training)
    if evaluation is not None:
        plan.suites.update({suite.name: suite for suite in evaluation.all_suites})
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
        if evaluation is not None:
            plan.evaluation_of[run.name] = evaluation.name
        search = run.search_job()
        if search is not None:
            plan.searches[search.name] = search


def processes_of(study: Study, training: Training) -> int:
    """Processes that train one of a method's runs: `gpus` of its entry, else of the study; 1 if it takes no step."""
    if not find_method(training.module).TRAINS:
        return 1
    return study.methods[training.label].gpus or study.runtime.gpus


def _check_processes(study: Study, training: Training) -> None:
    """Refuse processes that a step's micro-batches cannot be shared among, unless the run will be skipped anyway.

    Raises:
        UserError: with the key, and the mend.
    """
    count, micro_batches = processes_of(study, training), training.recipe.accumulation_steps
    if find_method(training.module).RANKS and micro_batches % count:
        key = f"methods.{training.label}.gpus" if study.methods[training.label].gpus else "runtime.gpus"
        raise UserError(
            f"{key}: {count} processes cannot share the {micro_batches} micro-batches of a step on task "
            f"{training.rows.label} evenly: choose batch_size / micro_batch_size as a multiple of it"
        )


def _evaluation(study: Study, training: Training) -> EvalJob | None:
    """How a method's runs on a task are scored; None where there is no suite: the validation loss stands alone."""
    entry = study.methods[training.label]
    suites = _suite_jobs(study.tasks[training.rows.label].suites)
    # a second entry of the untrained model differs by its shots alone, and nothing of forgetting depends on them
    again = entry.module == UNTRAINED and training.label != study.untrained()
    forgetting = () if again else _suite_jobs(study.forgetting)
    if not suites and not forgetting:
        return None
    return EvalJob(
        task=training.rows.label,
        suites=suites,
        max_length=training.recipe.max_length,
        prompt=training.prompt,
        shots=entry.shots if suites else 0,
        forgetting=forgetting,
    )


def _suite_jobs(suites: Mapping[str, SuiteSource]) -> tuple[SuiteJob, ...]:
    return tuple(SuiteJob(label=label, source=source) for label, source in suites.items())


def probe_job(study: Study, model: ModelJob, rows: RowsJob, probes: Probes) -> ProbeJob:
    """The probe of a model on a task: as the task's recipe reads rows and computes the loss."""
    recipe = task_recipe(study, rows.label)
    return ProbeJob(
        model=model,
        rows=rows,
        probes=probes,
        prompt=study.tasks[rows.label].prompt,
        max_length=recipe.max_length,
        loss_on=recipe.loss_on,
        weight_dtype=recipe.weight_dtype,
        compute_dtype=recipe.compute_dtype,
        device=recipe.device,
    )


def forecast_job(training: Training) -> ForecastJob | None:
    """The memory forecast that a run depends on; None on a CPU, and for a method that takes no step."""
    steps = training.recipe.device == "cuda" and find_method(training.module).TRAINS
    return ForecastJob(training=training) if steps else None


def write_specs(plan: Plan, paths: Paths) -> None:
    """Write each job's resolved spec if it is missing; existing specs are never changed."""
    specs = ((paths.spec(kind, name), job) for kind in KINDS for name, job in plan.jobs(kind).items())
    atomic.write_many_json((path, job.body()) for path, job in specs if not path.exists())


@dataclass(frozen=True)
class Output:
    """A file that one job declares."""

    path: Path
    kind: Kind[Any]
    name: str
    """Name of the job; for an evaluation, name of the run."""
    job: Job

    @property
    def weight(self) -> float:
        """Work in the job, in optimizer steps, see `harness.study.jobs.Kind`."""
        return self.kind.weight(self.job)


def outputs(plan: Plan, paths: Paths) -> list[Output]:
    """Every declared output of the jobs before `collect`."""
    found = [
        Output(paths.output(kind, name), kind, name, job)
        for kind in KINDS
        if kind is not EVALUATE
        for name, job in plan.jobs(kind).items()
    ]
    for run, evaluation in plan.evaluation_of.items():
        found.append(Output(paths.score(run, evaluation), EVALUATE, run, plan.evals[evaluation]))
    return found


def model_of(plan: Plan, output: Output) -> str | None:
    """Name of the model job that a file is made from; None for rows and suites, which no model enters."""
    job: Any = plan.runs[output.name] if output.kind is EVALUATE else output.job
    if isinstance(job, ModelJob):
        return job.name
    model: ModelJob | None = getattr(getattr(job, "training", job), "model", None)
    return None if model is None else model.name


def folder_bytes(paths: Iterable[Path]) -> int:
    """Size on disk of files and folders; what a running job removes meanwhile is not counted."""
    total = 0
    for path in paths:
        files = (Path(at, name) for at, _, names in os.walk(path) for name in names) if path.is_dir() else [path]
        for file in files:
            with suppress(FileNotFoundError):
                total += file.stat().st_size
    return total
