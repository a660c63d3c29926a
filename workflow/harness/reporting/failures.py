"""Runs of a study that left no record, with the reason that the log of the failed job has."""

from __future__ import annotations

from pathlib import Path

from harness.errors import OWN_FAULT
from harness.study.jobs import MODEL, ROWS, SEARCH, TRAIN
from harness.study.paths import Paths
from harness.study.plan import Plan

FAILED, NOT_RUN = "failed", "not run"
"""Statuses of such a run, in tables alone: a record never has them."""


def failed_runs(plan: Plan, paths: Paths) -> dict[str, str]:
    """Why each run without a record has none: the first of its jobs without output, and that one's last words."""
    found = {}
    for name, run in plan.runs.items():
        training, search = run.training, run.search_job()
        model = "pretrain" if training.model.name in plan.pretrained else "prefetch_model"
        jobs = [
            (model, training.model.name, paths.output(MODEL, training.model.name)),
            ("prefetch_rows", training.rows.name, paths.output(ROWS, training.rows.name)),
            *([] if search is None else [("search", search.name, paths.output(SEARCH, search.name))]),
            ("train", name, paths.output(TRAIN, name)),
        ]
        missing = next(((rule, job) for rule, job, output in jobs if not output.is_file()), None)
        if missing is not None:
            found[name] = reason(paths, *missing)
    return found


def status_of(why: str) -> str:
    """Whether a run failed, or has not come to its end yet, by the reason that `failed_runs` gives."""
    return FAILED if why.partition(" ")[2].startswith("failed: ") else NOT_RUN


def reason(paths: Paths, rule: str, job: str) -> str:
    """What the log of a job that left no output says last. A stage that fails says so itself; one that was killed, or
    that still runs, cannot.
    """
    log = paths.root / "logs" / rule / f"{job}.log"
    lines = _lines(log)
    told = [line for line in lines if OWN_FAULT not in line]
    if not told:
        return f"{rule} did not run"
    how = "failed" if any(line.startswith("harness ") for line in lines) else "did not finish"
    return f"{rule} {how}: {told[-1]} ({log})"


def _lines(log: Path) -> list[str]:
    if not log.is_file():
        return []
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return [line for line in lines if line]
