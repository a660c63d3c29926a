"""Time that a study's jobs will still take: arithmetic, corrected by how long finished jobs took. Imports no torch.

Arithmetic (`harness.study.needs`) takes rates of usual machines, and is a guess. Where jobs of the same kind on
the same model are done, it is scaled by their time over their arithmetic: by those of the same method and task, if
there are any, else of the method, of the task, of the model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from harness.records.reading import read
from harness.study import needs
from harness.study.jobs import EVALUATE, MODEL, OVERLAP, PROBE, SEARCH, TRAIN
from harness.study.paths import Paths
from harness.study.plan import Output, Plan, outputs

START_S = 5.0
"""Of a job: a process with torch and transformers, and a model from a disk."""

Key = tuple[str, ...]


@dataclass(frozen=True)
class Hours:
    """Time of the jobs that are to be done, one after the other."""

    seconds: float
    by_pace: int
    """Jobs whose time is taken from finished ones."""
    by_arithmetic: int
    """Jobs whose time is a guess."""


class _Timing(BaseModel):
    load_s: float = 0.0
    prepare_s: float | None = None
    train_s: float | None = None


class _Took(BaseModel):
    """What a record of any kind says of its time."""

    status: str = "ok"
    wall_s: float | None = None
    timing: _Timing | None = None

    @property
    def seconds(self) -> float | None:
        """Time of the job; None if it did not run to its end, or was not timed."""
        if self.status not in ("ok", "disengaged"):
            return None
        if self.timing is None:
            return self.wall_s
        if self.timing.train_s is None:
            return None
        return self.timing.load_s + (self.timing.prepare_s or 0.0) + self.timing.train_s


def hours_to_come(plan: Plan, paths: Paths) -> Hours:
    """Time of everything that is not done yet. Making rows, suites, forecasts and tables is left out: minutes."""
    took: dict[Key, float] = defaultdict(float)
    asked: dict[Key, float] = defaultdict(float)
    waiting: list[tuple[list[Key], float]] = []
    for output in outputs(plan, paths):
        arithmetic = _arithmetic(plan, output, paths)
        if arithmetic is None:
            continue
        keys = list(_keys(plan, output))
        if not output.path.exists():
            waiting.append((keys, arithmetic))
            continue
        seconds = read(output.path, _Took).seconds
        for key in keys if seconds is not None else ():
            took[key] += seconds or 0.0
            asked[key] += arithmetic
    total, by_pace = 0.0, 0
    for keys, arithmetic in waiting:
        known = next((key for key in keys if asked.get(key)), None)
        by_pace += known is not None
        total += START_S + arithmetic * (1.0 if known is None else took[known] / asked[known])
    return Hours(total, by_pace, len(waiting) - by_pace)


def _keys(plan: Plan, output: Output) -> Iterator[Key]:
    """What a job has in common with others, the closest kinship first. A search trains as runs do."""
    job: Any = plan.runs[output.name] if output.kind is EVALUATE else output.job
    kind = TRAIN.name if output.kind is SEARCH else output.kind.name
    if output.kind in (MODEL, OVERLAP):
        return
    training = getattr(job, "training", job)
    model, task, method = training.model.name, training.rows.label, getattr(training, "label", "")
    yield kind, model, f"task {task}", f"method {method}"
    yield kind, model, f"method {method}"
    yield kind, model, f"task {task}"
    yield kind, model


def _arithmetic(plan: Plan, output: Output, paths: Paths) -> float | None:
    """Seconds of a job by arithmetic; None for jobs of minutes."""
    job: Any = output.job
    if output.kind is MODEL:
        return needs.of_model(job, paths, pace=needs.USUAL).seconds
    if output.kind is PROBE:
        return needs.of_probe(job, paths, pace=needs.USUAL).seconds
    if output.kind is SEARCH:
        return needs.of_training(
            job.trial, paths, runs=len(job.search.grid) * len(job.search.seeds), pace=needs.USUAL
        ).seconds
    if output.kind is TRAIN:
        return needs.of_training(job.training, paths, pace=needs.USUAL).seconds
    if output.kind is EVALUATE:
        training, batch = plan.runs[output.name].training, plan.study.runtime.eval_batch_size
        return needs.of_evaluation(job, training, paths, batch_size=batch, pace=needs.USUAL).seconds
    return None
