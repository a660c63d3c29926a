"""Runs of a study that left no record, with the reason that the log of the failed job has."""

from __future__ import annotations

from harness.study.jobs import MODEL, ROWS, SEARCH, TRAIN
from harness.study.last_words import reason
from harness.study.paths import Paths
from harness.study.plan import Plan


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
