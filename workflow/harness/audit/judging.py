"""Verdicts on the observations of an audit: each names the fault, its place, and the remedy."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from tabulate import tabulate

from harness.audit.facts import Facts, Tensor

WIDTH = 110
FLAT = 1e-9
"""Relative change of a learning rate that counts as none."""


@dataclass(frozen=True)
class Finding:
    """One verdict. `BROKEN` is a fault in any method; `LOOK` is a fault unless the method intends it."""

    verdict: Literal["ok", "LOOK", "BROKEN"]
    text: str


def judge(facts: Facts) -> list[Finding]:
    """All verdicts, in the order in which a reader should check them."""
    if not facts.steps:
        return [Finding("BROKEN", "the optimizer took no step: nothing was trained")]
    return [check(facts) for check in (_moves, _held, _gradients, _frozen, _stale, _state, _schedule, _rotation)]


def report(facts: Facts) -> str:
    """The report: table of parts, growth of optimizer state, verdicts."""
    rows = []
    for part in facts.parts():
        tensors = facts.of(part)
        on = max(t.on for t in tensors)
        rows.append(
            {
                "part": part,
                "parameters": f"{sum(t.elements for t in tensors):,}",
                "switched on": on,
                "got gradients": max(t.graded for t in tensors),
                "moved": max(t.moved for t in tensors),
                "moved while off": max(t.moved_off for t in tensors),
                "in optimizer": _share(tensors, lambda t: t.in_optimizer),
            }
        )
    lines = [
        f"audit of {facts.steps} steps of {facts.optimizer} on {facts.model}, {facts.layers} decoder layers; counts "
        f"are intervals, of {facts.intervals}",
        tabulate(rows, headers="keys", colalign=("left", *["right"] * 6), disable_numparse=True),
        "",
    ]
    verdicts = [
        textwrap.fill(finding.text, WIDTH, initial_indent=f"{finding.verdict:<8}", subsequent_indent=" " * 8)
        for finding in judge(facts)
    ]
    return "\n".join([*lines, *verdicts])


def _moves(facts: Facts) -> Finding:
    still = [t for t in facts.tensors.values() if t.on_with_rate and not t.moved and not t.coarse]
    if not still:
        return Finding("ok", "whatever was switched on and got a gradient moved")
    missing = [t for t in still if not t.in_optimizer]
    why = "the optimizer steps them without effect"
    if missing:
        why = (
            "the optimizer does not hold them: it was built while they were frozen. Build it over all parameters "
            "first, freeze after"
        )
    return Finding("BROKEN", f"{_where(facts, still)} got gradients and never moved: {why}")


def _held(facts: Facts) -> Finding:
    rotates = len(set(facts.sets)) > 1
    never = [t for t in facts.tensors.values() if not t.in_optimizer and not t.moved and not t.on_with_rate]
    if not rotates or not never:
        return Finding("ok", "nothing that will be switched on is unknown to the optimizer")
    text = f"{_where(facts, never)} are in no parameter group: should they be switched on later, they will not move"
    return Finding("LOOK", text)


def _gradients(facts: Facts) -> Finding:
    without = [t for t in facts.tensors.values() if t.on and not t.graded]
    if not without:
        return Finding("ok", "whatever was switched on got gradients")
    return Finding(
        "BROKEN",
        f"{_where(facts, without)} were switched on and never had a gradient: does the loss reach them? Re-entrant "
        "checkpointing behind a frozen embedding cuts backward off: use_reentrant=False",
    )


def _frozen(facts: Facts) -> Finding:
    drifted = [t for t in facts.tensors.values() if t.moved_off]
    if not drifted:
        return Finding("ok", "nothing moved while it was switched off")
    return Finding(
        "BROKEN",
        f"{_where(facts, drifted)} moved while switched off: zero gradients are no missing gradients, momentum and "
        "weight decay go on. Use zero_grad(set_to_none=True), and drop the gradient when switching off",
    )


def _stale(facts: Facts) -> Finding:
    stale = [t for t in facts.tensors.values() if t.stale_gradients]
    if not stale:
        return Finding("ok", "no gradient was alive where none is wanted")
    return Finding(
        "BROKEN",
        f"{_where(facts, stale)} had a gradient while switched off: it should be None, else the optimizer steps with "
        "it and its memory is not freed",
    )


def _state(facts: Facts) -> Finding:
    first, last = facts.state[0], facts.state[-1]
    most = max(facts.state, key=lambda s: s.total)
    grew = f"state: {_bytes(first.total)} after the first step, {_bytes(last.total)} at the end"
    if most.total > last.total:
        grew += f", {_bytes(most.total)} at its peak"
    if not last.sleeping:
        return Finding("ok", f"{grew}; none of it belongs to what is switched off")
    return Finding(
        "LOOK",
        f"{grew}, {last.sleeping / max(1, last.total):.0%} of it for what is switched off, on the device: memory "
        "climbs towards that of full fine-tuning. Drop or move the state of what falls asleep, unless keeping it here "
        "is meant",
    )


def _schedule(facts: Facts) -> Finding:
    groups = max(len(rates) for rates in facts.rates)
    series = [[rates[i] for rates in facts.rates if i < len(rates)] for i in range(groups)]
    varies = [max(s) - min(s) > FLAT * max(max(s), FLAT) for s in series]
    if not any(varies):
        return Finding("ok", "every learning rate stayed as it was")
    flat = [i for i, moved in enumerate(varies) if not moved and len(series[i]) > 1]
    if not flat:
        return Finding("ok", "the schedule reached every parameter group")
    named = "; ".join(f"group {i} ({_parts(facts.group_parts[i])}) stayed at {series[i][0]:g}" for i in flat)
    return Finding(
        "BROKEN",
        f"the schedule does not reach every parameter group: {named}. Let it set the rate of every group, those that "
        "came late too",
    )


def _rotation(facts: Facts) -> Finding:
    distinct = len(set(facts.sets))
    always = sorted({part for part in facts.parts() if all(part in s for s in facts.sets)}, key=facts.parts().index)
    if distinct == 1:
        return Finding("ok", f"one set of parts for all steps: {_parts(always)}; nothing was ever switched")
    never = [part for part in facts.parts() if part.startswith("layer") and not any(part in s for s in facts.sets)]
    text = f"{distinct} distinct sets in {facts.intervals} intervals"
    return Finding("ok", text + (f"; never on: {_parts(never)}" if never else "; every layer was on"))


# ------------------------------------------------------------ words


def _where(facts: Facts, tensors: Iterable[Tensor]) -> str:
    """The parts that these tensors are in, with their number if they are not all tensors of these parts."""
    chosen = list(tensors)
    parts = [part for part in facts.parts() if any(t.part == part for t in chosen)]
    everything = sum(len(facts.of(part)) for part in parts)
    some = f"{len(chosen)} of {everything} tensors of " if len(chosen) < everything else ""
    return some + _parts(parts)


def _parts(parts: list[str]) -> str:
    """`layers 0-3, 5, head`: consecutive layers are joined."""
    numbers = [int(part.split()[1]) for part in parts if part.startswith("layer ")]
    others = [part for part in parts if not part.startswith("layer ")]
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    joined = ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
    layers = [f"layer{'s' if len(numbers) > 1 else ''} {joined}"] if numbers else []
    return ", ".join([*layers, *others]) or "nothing of the model's own"


def _share(tensors: list[Tensor], holds: Callable[[Tensor], bool]) -> str:
    count = sum(map(holds, tensors))
    return "yes" if count == len(tensors) else "no" if not count else f"{count} of {len(tensors)}"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count / 2**10:,.1f} KiB"
