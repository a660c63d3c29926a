"""What the log of a job that left no record says: whether the job failed, and why."""

from __future__ import annotations

import re
from pathlib import Path

from harness.errors import OWN_FAULT
from harness.study.jobs import EVALUATE, MODEL, ROWS, SUITE
from harness.study.paths import Paths
from harness.study.plan import Output, Plan

FAILED, NOT_RUN = "failed", "not run"
"""Statuses of such a run, in tables alone: a record never has them."""

_RULES = {ROWS.name: "prefetch_rows", SUITE.name: "prefetch_suite"}
"""Of kinds whose rule is called otherwise, see `workflow/rules`."""


_WARNING = re.compile(r":\d+: \w*Warning: ")


def status_of(why: str) -> str:
    """Whether a run failed, or has not come to its end yet, by the reason that `failed_runs` gives."""
    return FAILED if why.partition(" ")[2].startswith("failed: ") else NOT_RUN


def reason(paths: Paths, rule: str, job: str) -> str:
    """What the log of a job that left no output says last. A stage that fails says so itself; one that was killed, or
    that still runs, cannot.
    """
    log = log_of(paths, rule, job)
    lines = _lines(log)
    told = [line for line in lines if OWN_FAULT not in line]
    if not told:
        return f"{rule} did not run"
    how = "failed" if any(line.startswith("harness ") for line in lines) else "did not finish"
    return f"{rule} {how}: {told[-1]} ({log})"


def _lines(log: Path) -> list[str]:
    if not log.is_file():
        return []
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    # of Python's warnings not the line of code that stands below each: it says nothing
    said = [
        line.strip()
        for before, line in zip(["", *lines], lines, strict=False)
        if not (_WARNING.search(before) and line.startswith("  "))
    ]
    return [line for line in said if line and not _WARNING.search(line)] or [line for line in said if line]


def log_of(paths: Paths, rule: str, job: str) -> Path:
    """The log of a rule's job."""
    return paths.root / "logs" / rule / f"{job}.log"


def rule_of(plan: Plan, output: Output) -> tuple[str, str]:
    """The rule that makes an output, and the name of its job there."""
    if output.kind is MODEL:
        return ("pretrain" if output.name in plan.pretrained else "prefetch_model"), output.name
    if output.kind is EVALUATE:
        return "evaluate", f"{output.name}--{output.job.name}"
    return _RULES.get(output.kind.name, output.kind.name), output.name
