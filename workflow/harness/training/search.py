"""Learning-rate search: the same grid, seeds, steps and rule for every method."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from harness import sign
from harness.progress import say
from harness.records import atomic
from harness.records.claim import claim, with_code
from harness.records.code import search as roots_of
from harness.records.provenance import provenance
from harness.records.reading import read
from harness.records.run import SearchRecord, TrainRecord, Trial
from harness.study.jobs import SearchJob
from harness.training.loading import Inputs
from harness.training.loop import train

Attempt = Callable[..., TrainRecord]


def search(
    job: SearchJob,
    *,
    inputs: Inputs,
    trials_folder: Path,
    checkpoint_every: int = 100,
    refusal: str | None = None,
) -> SearchRecord:
    """Train at every rate of the grid with every search seed; extend the grid while the best lies at its edge.

    The rule: lowest validation loss, averaged over the search seeds; a rate at which any seed diverged or ran out of
    memory does not count. An extension continues the grid by the ratio of its two outermost points. All trials run in
    one process, so that the imports are done only once.

    Args:
        job: the resolved spec.
        inputs: folders of model and rows.
        trials_folder: finished trials are written there one by one, and reused after a kill; the trial that was killed
            goes on from its own resume state.
        checkpoint_every: steps between two resume states of a trial.
        refusal: reason, known beforehand, why no trial must start.
    """
    started = time.perf_counter()
    if dropped := claim(trials_folder, with_code(inputs.made_from, roots_of(job.training.module))):
        say(f"{job.name}: {dropped}")
    attempt = partial(
        train, job.trial, lr_searched=False, inputs=inputs, folder=None, refusal=refusal,
        checkpoint_every=checkpoint_every,
    )  # fmt: skip
    given = sorted(job.search.grid)
    grid, trials = list(given), []
    for lr in given:
        trials += _trials(job, lr, attempt, extension=False, folder=trials_folder)
    for _ in range(job.search.max_extensions):
        best = _best(trials)
        if best is None or grid[0] < best < grid[-1]:
            break
        lr = grid[0] ** 2 / grid[1] if best == grid[0] else grid[-1] ** 2 / grid[-2]
        lr = float(f"{lr:.3g}")
        grid = sorted([*grid, lr])
        trials += _trials(job, lr, attempt, extension=True, folder=trials_folder)
    best = _best(trials)
    return SearchRecord(
        name=job.name,
        model=job.training.model.label,
        task=job.training.rows.label,
        method=job.training.label,
        lr=best,
        lr_why=None if best is not None else "no rate trained with every search seed",
        at_edge=best is not None and best in (grid[0], grid[-1]),
        trials=trials,
        wall_s=time.perf_counter() - started,
        provenance=provenance(roots=roots_of(job.training.module), inputs=inputs.files()),
    )


def _trials(job: SearchJob, lr: float, attempt: Attempt, *, extension: bool, folder: Path) -> list[Trial]:
    return [_trial(job, lr, seed, attempt, extension=extension, folder=folder) for seed in job.search.seeds]


def _trial(job: SearchJob, lr: float, seed: int, attempt: Attempt, *, extension: bool, folder: Path) -> Trial:
    path = folder / f"lr{lr:g}-seed{seed}.json"
    if path.exists():
        return read(path, Trial)
    label = f"{job.training.rows.label} {job.training.label} lr {lr:g} seed {seed}"
    state = path.with_suffix("")
    number, seeds = 1 + sum(1 for _ in folder.glob("lr*-seed*.json")), len(job.search.seeds)
    # trials of an extension are not known beforehand
    sign.tell(trial=number, trials=max(len(job.search.grid) * seeds, -(-number // seeds) * seeds))
    record = attempt(name=label, lr=lr, seed=seed, state_folder=state)
    trial = Trial(
        lr=lr,
        seed=seed,
        status=record.status,
        status_why=record.status_why,
        validation_loss=record.validation_loss,
        extension=extension,
    )
    atomic.write_record(path, trial)
    shutil.rmtree(state, ignore_errors=True)
    return trial


def _best(trials: list[Trial]) -> float | None:
    """Rate with the lowest mean validation loss, among those at which every seed trained."""
    means = {}
    for lr in {trial.lr for trial in trials}:
        mine = [trial for trial in trials if trial.lr == lr]
        losses = [trial.validation_loss for trial in mine if trial.status == "ok" and trial.validation_loss is not None]
        if len(losses) == len(mine):
            means[lr] = float(np.mean(losses))
    return min(means, key=lambda lr: means[lr]) if means else None
