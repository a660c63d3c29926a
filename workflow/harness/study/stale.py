"""Whether a record was made by today's code."""

from __future__ import annotations

from harness.records import code
from harness.records.provenance import source_sha256
from harness.study.plan import Output, Plan


def current_sha256(plan: Plan, output: Output) -> str:
    """Hash that a record would carry if it were made by today's code."""
    if output.kind == "model":
        return source_sha256(code.PRETRAINED_MODEL if output.name in plan.pretrained else code.FOUND_MODEL)
    if output.kind in ("rows", "suite"):
        return source_sha256(code.ROWS)
    if output.kind == "evaluate":
        return source_sha256(code.EVALUATION)
    if output.kind == "forecast":
        return source_sha256(code.forecast(plan.forecasts[output.name].training.module))
    if output.kind == "search":
        return source_sha256((*code.training(plan.searches[output.name].training.module), "harness.training.search"))
    return source_sha256(code.training(plan.runs[output.name].training.module))
