"""Verdicts on the observations of an audit: each names the fault, its place, and the remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from harness.audit.facts import Event, Facts, Group, Tensor
from harness.audit.words import amount, names, where

_CHANGES: tuple[Event, ...] = ("moved", "dragged", "moved_alone", "written")


@dataclass(frozen=True)
class Finding:
    """One verdict. `BROKEN` is a fault in any script; `LOOK` is a fault unless it is meant, or beyond an audit."""

    verdict: Literal["ok", "LOOK", "BROKEN"]
    text: str


def judge(facts: Facts) -> list[Finding]:
    """All verdicts, in the order in which a reader should check them."""
    if not facts.steps:
        return [_no_step(facts)]
    checks = (_left_out, _moves, _held, _gradients, _frozen, _stale, _written, _state, _schedule, _rotation)
    return [finding for check in checks for finding in check(facts)]


def _no_step(facts: Facts) -> Finding:
    written = _those(facts, "written")
    if not written:
        return Finding("BROKEN", "the optimizer took no step: nothing was trained")
    return Finding(
        "LOOK",
        f"the optimizer took no step, and {where(facts, written)} changed all the same: updates are made in backward "
        "(LOMO), by an optimizer that is not torch's, or by the script. Only the weights before and after were "
        "compared: which layers trained when is beyond this audit",
    )


def _left_out(facts: Facts) -> Iterator[Finding]:
    others = Counter(t.other for t in facts.tensors.values() if t.left_out)
    for other, count in others.items():
        held = [t for t in facts.tensors.values() if t.left_out and t.other == other]
        yield Finding(
            "LOOK",
            f"{count} of the model's tensors, in {names(facts.in_order(t.part for t in held))}, are in {other} alone, "
            "which this audit was not given: they are left out. Audit(model, [one, other]) watches several optimizers",
        )


def _moves(facts: Facts) -> Iterator[Finding]:
    forgotten = [t for t in facts.judged() if t.forgotten]
    # whoever trains the head alone need not freeze the rest; but what is switched on and off is meant to train
    switched = [t for t in forgotten if t.on < facts.intervals and not t.waiting]
    always = [t for t in forgotten if t.on == facts.intervals and not t.waiting]
    waiting = [t for t in forgotten if t.waiting]
    by_hand = [t for t in _those(facts, "pending") if t.written and not (t.moved or t.in_optimizer or t.other)]
    idle = [t for t in facts.judged() if t.idle and t.unmoved]
    # where none of what rotates is held, switching may serve to look at gradients alone
    rotating = any(t.in_optimizer and 0 < t.on < facts.intervals for t in facts.judged())
    if switched and rotating:
        yield Finding(
            "BROKEN",
            f"{where(facts, switched)} got gradients and never moved: the optimizer does not hold them: it was built "
            "while they were frozen. Build it over all parameters first, freeze after",
        )
    elif switched:
        yield Finding(
            "LOOK",
            f"{where(facts, switched)} were switched on and off, got gradients and never moved: the optimizer holds "
            "nothing that is switched. Was it built while all of it was frozen? Then build it over all parameters "
            "first. Right only if the script switches to look at gradients",
        )
    if always:
        yield Finding(
            "LOOK",
            f"{where(facts, always)} got gradients in every step and are in no optimizer: nothing trains them. Freeze "
            "them if that is meant; else build the optimizer over all parameters",
        )
    for other in sorted({t.waiting for t in waiting}):
        those = [t for t in waiting if t.waiting == other]
        yield Finding(
            "LOOK", f"{where(facts, those)} got gradients and are in {other} alone, which took no step: is it used?"
        )
    if by_hand:
        yield Finding(
            "LOOK",
            f"{where(facts, by_hand)} got gradients, are in no optimizer, and changed between steps alone: does the "
            "script update them itself?",
        )
    if idle:
        yield Finding(
            "LOOK",
            f"{where(facts, idle)} got gradients, and no step of the optimizer that holds them moved them: does it "
            "choose by itself what to update, is the rate too small for these weights, or was the audit too short?",
        )
    if not any(getattr(t, event) for t in facts.judged() for event in _CHANGES):
        yield Finding("LOOK", f"no weight moved in all {facts.steps} steps: {_why_nothing_moved(facts)}")
    elif not (forgotten or by_hand or idle):
        yield Finding("ok", "whatever was switched on and got a gradient moved")


def _why_nothing_moved(facts: Facts) -> str:
    if not any(t.in_optimizer for t in facts.tensors.values()):
        return "no optimizer holds a parameter of this model"
    if facts.groups and all(group.high == 0 for group in facts.groups):
        return "every learning rate was 0"
    return "no gradients, steps that a loss scaler skipped, or an optimizer that updates only now and then?"


def _held(facts: Facts) -> Iterator[Finding]:
    rotates = len(set(facts.sets)) > 1
    never = [t for t in facts.judged() if not t.in_optimizer and t.unmoved and not t.pending]
    if not rotates or not never:
        yield Finding("ok", "nothing that will be switched on is unknown to the optimizer")
    else:
        yield Finding(
            "LOOK",
            f"{where(facts, never)} are in no parameter group: should they be switched on later, they will not move",
        )


def _gradients(facts: Facts) -> Iterator[Finding]:
    without = [t for t in facts.judged() if t.on and not t.graded and t.unmoved]
    if not without:
        yield Finding("ok", "whatever was switched on got gradients")
        return
    text = f"{where(facts, without)} were switched on and never had a gradient: does the loss reach them?"
    layers = [t for t in facts.judged() if t.part.startswith("layer") and t.on]
    # a script may leave an expert, a layer or all of them out on purpose; this way of losing them has no purpose
    if facts.reentrant and any(t.in_optimizer for t in layers) and not any(t.graded for t in layers):
        text += " Re-entrant checkpointing behind a frozen embedding cuts backward off: use_reentrant=False"
        yield Finding("BROKEN", text)
    else:
        yield Finding("LOOK", text)


def _frozen(facts: Facts) -> Iterator[Finding]:
    dragged, alone = _those(facts, "dragged"), _those(facts, "moved_alone")
    if dragged:
        yield Finding(
            "BROKEN",
            f"{where(facts, dragged)} moved while switched off: zero gradients are no missing gradients, momentum and "
            "weight decay go on. Use zero_grad(set_to_none=True), and drop the gradient when switching off",
        )
    if alone:
        yield Finding(
            "LOOK",
            f"{where(facts, alone)} moved in the optimizer's step while switched off, and no gradient was left over: "
            "right only for an optimizer that writes weights by its own rule (averages, Lookahead, gradients set by "
            "hand)",
        )
    if not dragged and not alone:
        yield Finding("ok", "nothing moved while it was switched off")


def _stale(facts: Facts) -> Iterator[Finding]:
    left, by_hand = _those(facts, "left_over"), _those(facts, "set_by_hand")
    if left:
        harmful = any(t.dragged for t in left)
        yield Finding(
            "BROKEN" if harmful else "LOOK",
            f"{where(facts, left)} had a gradient while switched off: it should be None, else the optimizer steps with "
            "it and its memory is not freed",
        )
    if by_hand:
        yield Finding(
            "LOOK",
            f"{where(facts, by_hand)} had a gradient while switched off that no backward pass of this audit made: is "
            "it set by hand?",
        )
    if not left and not by_hand:
        yield Finding("ok", "no gradient was alive where none is wanted")


def _written(facts: Facts) -> Iterator[Finding]:
    written = _those(facts, "written")
    if not written:
        yield Finding("ok", "no weight changed between steps")
        return
    others = sorted({t.other for t in written if t.other})
    also = f" Some are also in {' and '.join(others)}, which this audit was not given." if others else ""
    yield Finding(
        "LOOK",
        f"{where(facts, written)} changed between two steps: by updates made in backward, or by the script (a "
        f"checkpoint loaded, an average, a merge). Which of them, and whether it is meant, is beyond an audit.{also}",
    )


def _state(facts: Facts) -> Iterator[Finding]:
    first, last = facts.state[0], facts.state[-1]
    most = max(facts.state, key=lambda s: s.total)
    grew = f"state: {amount(first.total)} after the first step, {amount(last.total)} at the end"
    if most.total > last.total:
        grew += f", {amount(most.total)} at its peak"
    if not last.sleeping:
        yield Finding("ok", f"{grew}; none of it belongs to what is switched off")
        return
    yield Finding(
        "LOOK",
        f"{grew}, {last.sleeping / max(1, last.total):.0%} of it for what is switched off, on the device: memory "
        "climbs towards that of full fine-tuning. Drop or move the state of what falls asleep, unless keeping it here "
        "is meant",
    )


def _schedule(facts: Facts) -> Iterator[Finding]:
    varying = [group for group in facts.groups if group.varies]
    flat = [group for group in facts.groups if not group.varies and group.steps > 1]
    # rate 0 times any factor is 0, and a scheduler of torch that keeps a rate was told to
    doubtful = [group for group in flat if group.stays_unasked]
    # a group that was never to follow has a rate of its own
    forgotten = [g for g in doubtful if any(g.owner == v.owner and g.first == v.first for v in varying)]
    other = [group for group in doubtful if group not in forgotten]
    if not varying:
        yield Finding("ok", "every learning rate stayed as it was")
        return
    if forgotten:
        yield Finding(
            "LOOK",
            f"the schedule does not reach every parameter group: {_rates(facts, forgotten)}, while others that began "
            "there changed. Unless that is meant, let it set the rate of every group, those that came late too",
        )
    if other:
        yield Finding("LOOK", f"while other rates follow a schedule, {_rates(facts, other)}: is it meant to?")
    if not doubtful:
        kept = f"; {_rates(facts, flat)}, as it says" if flat else ""
        yield Finding("ok", f"the schedule reached every parameter group{kept}")


def _rates(facts: Facts, groups: Iterable[Group]) -> str:
    """Groups with their parts and rate; those of one kind of optimizer at one rate are said together."""
    alike: dict[tuple[str, float], list[Group]] = {}
    for group in groups:
        alike.setdefault((group.optimizer, group.first), []).append(group)
    several = len({group.owner for group in facts.groups}) > 1
    said = []
    for (optimizer, rate), those in alike.items():
        which = f"group {those[0].number}" if len(those) == 1 else f"{len(those)} groups"
        parts = names(facts.in_order(part for group in those for part in group.parts))
        said.append(f"{which}{f' of {optimizer}' if several else ''} ({parts}) stayed at {rate:g}")
    return "; ".join(said)


def _rotation(facts: Facts) -> Iterator[Finding]:
    distinct = len(set(facts.sets))
    always = [part for part in facts.parts() if all(part in s for s in facts.sets)]
    if distinct == 1:
        yield Finding("ok", f"one set of parts for all steps: {names(always)}; nothing was ever switched")
        return
    never = [part for part in facts.parts() if part.startswith("layer") and not any(part in s for s in facts.sets)]
    text = f"{distinct} distinct sets in {facts.intervals} intervals"
    yield Finding("ok", text + (f"; never on: {names(never)}" if never else "; every layer was on"))


def _those(facts: Facts, event: Event) -> list[Tensor]:
    """Judged tensors with an event."""
    return [tensor for tensor in facts.judged() if getattr(tensor, event)]
