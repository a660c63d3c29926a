"""An audit's report as text: a table of parts, and the verdicts."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

from tabulate import tabulate

from harness.audit.facts import Event, Facts, Tensor
from harness.audit.judging import judge

WIDTH = 110


def report(facts: Facts) -> str:
    """The table, in intervals, then the verdicts; a part whose tensors are all left out has no row."""
    columns: dict[str, tuple[Event, ...]] = {
        "switched on": ("on",),
        "got gradients": ("graded",),
        "moved": ("moved",),
        "moved while off": ("dragged", "moved_alone"),
    }
    if any(tensor.written for tensor in facts.judged()):
        columns["between steps"] = ("written",)
    rows = []
    for part in facts.parts():
        tensors = facts.of(part)
        if tensors:
            counts = {
                column: max(max(getattr(tensor, event) for event in events) for tensor in tensors)
                for column, events in columns.items()
            }
            size = f"{sum(t.elements for t in tensors):,}"
            rows.append(
                {"part": part, "parameters": size, **counts, "in optimizer": _share(tensors, lambda t: t.in_optimizer)}
            )
    lines = [
        f"audit of {facts.steps} steps of {facts.optimizer} on {facts.model}, {facts.layers} decoder layers; counts "
        f"are intervals, of {facts.intervals}",
        tabulate(rows, headers="keys", colalign=("left", *["right"] * (len(columns) + 2)), disable_numparse=True),
        "",
    ]
    verdicts = [
        textwrap.fill(finding.text, WIDTH, initial_indent=f"{finding.verdict:<8}", subsequent_indent=" " * 8)
        for finding in judge(facts)
    ]
    return "\n".join([*lines, *verdicts])


def _share(tensors: list[Tensor], holds: Callable[[Tensor], bool]) -> str:
    count = sum(map(holds, tensors))
    return "yes" if count == len(tensors) else "no" if not count else f"{count} of {len(tensors)}"
