"""A small study and what follows from it: the jobs that tests of planning look at, by name."""

from __future__ import annotations

from pathlib import Path

import study_files
from harness.study.config import load_study
from harness.study.plan import Plan, resolve_study

# without a fixed rate and a task's own recipe; with an untrained row
STUDY = (
    study_files.STUDY.replace("    recipe: {steps: 12}\n", "")
    .replace("  fixed: {module: full, lr: 1.0e-3}\n", "")
    .replace("methods:\n", "methods:\n  base: {module: base, seeds: [0]}\n")
    + "runtime: {threads: 1}\n"
)


def written(folder: Path, *edits: tuple[str, str]) -> Path:
    return study_files.written(folder, *edits, text=STUDY)


def plan_of(folder: Path, *edits: tuple[str, str]) -> Plan:
    return resolve_study(load_study(written(folder, *edits)))


def every_name(plan: Plan) -> set[str]:
    jobs = (plan.models, plan.rows, plan.suites, plan.overlaps, plan.searches, plan.runs, plan.evals)
    return {name for kind in jobs for name in kind}


def of_method(plan: Plan, label: str) -> set[str]:
    return {name for name in plan.runs if f"--{label}--" in name}
