"""What a record must agree with before it enters a table: its job, its own logs, the documents that it counts.

A record that does not is named with its mend. It is never averaged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import Table

from harness.errors import UserError
from harness.records.run import EvalRecord, SearchRecord, TrainRecord
from harness.study.jobs import EvalJob, RunJob, SearchJob
from harness.study.sources import LmEvalSuite

LOSS_TOLERANCE = 1e-6
"""Largest relative difference of a mean loss and the same mean taken here: sums of floats in another order."""


def check_run(record: TrainRecord, name: str, job: RunJob, path: Path, *, logged_steps: int) -> None:
    """Hold a run's record to its job and to its log of steps.

    Raises:
        UserError: they disagree; the message names the record and the first thing that differs.
    """
    training = job.training
    asked: dict[str, Any] = {
        "name": name, "model": training.model.label, "task": training.rows.label, "method": training.label,
        "module": training.module, "seed": job.seed,
    }  # fmt: skip
    if job.lr is not None:
        asked["lr"] = job.lr
    _same(path, record, asked)
    steps = 0 if record.lr is None else training.recipe.steps
    if record.status == "ok" and record.steps_done != steps:
        raise _untrusted(path, f"an ok run of {record.steps_done} steps, where {steps} were asked for")
    if logged_steps != record.steps_done:
        raise _untrusted(path, f"{record.steps_done} steps, but steps.jsonl beside it has {logged_steps}")


def check_search(record: SearchRecord, name: str, job: SearchJob, path: Path) -> None:
    """Hold a search's record to its job.

    Raises:
        UserError: they disagree.
    """
    training = job.training
    labels = {"model": training.model.label, "task": training.rows.label, "method": training.label}
    _same(path, record, {"name": name, **labels})
    tried = {(trial.lr, trial.seed) for trial in record.trials}
    missing = [(lr, seed) for lr in job.search.grid for seed in job.search.seeds if (lr, seed) not in tried]
    if missing:
        raise _untrusted(path, f"no trial of rate {missing[0][0]:g} with seed {missing[0][1]}")
    if record.lr is not None and record.lr not in {trial.lr for trial in record.trials if trial.status == "ok"}:
        raise _untrusted(path, f"chose the rate {record.lr:g}, which no ok trial has")


def check_scores(record: EvalRecord, run: str, job: EvalJob, documents: Table | None, path: Path) -> None:
    """Hold a run's scores to their job, and each count to the documents that it counts.

    Args:
        record: the scores.
        run: name of the run.
        job: how it was to be scored.
        documents: outcomes by document; None where nothing was scored.
        path: of the record.

    Raises:
        UserError: they disagree.
    """
    _same(path, record, {"name": job.name, "run": run})
    if record.status == "skipped" or documents is None:
        return
    asked = [suite.label for suite in job.all_suites if not isinstance(suite.source, LmEvalSuite)]
    scored = [score.suite for score in record.scores]
    wrong = _not_once(scored, asked, all_of_them=record.status == "ok")
    if wrong is not None:
        raise _untrusted(
            path, f"suite {wrong} is scored {scored.count(wrong)} times, where {', '.join(asked)} were asked"
        )
    counts = _counts(documents, run)
    if counts.keys() - set(scored):
        raise _untrusted(path, "its documents are of other suites, or of another run")
    for score in record.scores:
        counted = counts.get(score.suite, _Counts())
        for what in ("rows", "correct", "correct_normalised", "unparsed"):
            said, found = getattr(score, what), getattr(counted, what)
            if said is not None and said != found:
                raise _untrusted(path, f"suite {score.suite} has {what} {said}, but its documents have {found}")
        if not _close(counted.mean_loss, score.heldout_loss):
            raise _untrusted(path, f"suite {score.suite} has another held-out loss than its documents")


def _same(path: Path, record: Any, asked: Mapping[str, Any]) -> None:
    for key, value in asked.items():
        if (said := getattr(record, key)) != value:
            raise _untrusted(path, f"{key} is {said!r}, where {value!r} was asked for")


def _not_once(found: Sequence[str], asked: Sequence[str], *, all_of_them: bool) -> str | None:
    """The first label that does not stand once among those found, as asked."""
    for label in asked:
        if found.count(label) > 1 or (all_of_them and label not in found):
            return label
    return next((label for label in found if label not in asked), None)


def _close(loss: float | None, said: float | None) -> bool:
    return loss is None or said is None or math.isclose(loss, said, rel_tol=LOSS_TOLERANCE)


@dataclass
class _Counts:
    """What the documents of one suite add up to."""

    rows: int = 0
    correct: int = 0
    correct_normalised: int = 0
    unparsed: int = 0
    tokens: int = 0
    nats: float = 0.0

    @property
    def mean_loss(self) -> float | None:
        """Nats per answer token; None without one."""
        return self.nats / self.tokens if self.tokens else None


def _counts(documents: Table, run: str) -> dict[str, _Counts]:
    """By suite; documents of another run are under an empty name. Without pandas: most tables are short, and many."""
    found: dict[str, _Counts] = {}
    columns = ("run", "suite", "correct", "correct_normalised", "parsed", "loss", "tokens")
    for of_run, suite, correct, normalised, parsed, loss, tokens in zip(
        *(documents.column(column).to_pylist() for column in columns), strict=True
    ):
        counts = found.setdefault(suite if of_run == run else "", _Counts())
        counts.rows += 1
        counts.correct += correct is True
        counts.correct_normalised += normalised is True
        counts.unparsed += parsed is False
        if isinstance(loss, float) and tokens:
            counts.tokens += tokens
            counts.nats += loss * tokens
    return found


def _untrusted(path: Path, what: str) -> UserError:
    return UserError(f"{path} does not agree with what was run: {what}; remove it and run again")
