"""How an audit names tensors, parts and amounts."""

from __future__ import annotations

from collections.abc import Iterable

from harness.audit.facts import Facts, Tensor


def where(facts: Facts, tensors: Iterable[Tensor]) -> str:
    """The parts that these tensors are in, with their number if they are not all tensors of these parts."""
    chosen = list(tensors)
    parts = facts.in_order(t.part for t in chosen)
    everything = sum(len(facts.of(part)) for part in parts)
    some = f"{len(chosen)} of {everything} tensors of " if len(chosen) < everything else ""
    return some + names(parts)


def names(parts: Iterable[str]) -> str:
    """`layers 0-3, 5, head`: consecutive layers are joined."""
    chosen = list(parts)
    numbers = [int(part.split()[1]) for part in chosen if part.startswith("layer ")]
    others = [part for part in chosen if not part.startswith("layer ")]
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    joined = ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
    layers = [f"layer{'s' if len(numbers) > 1 else ''} {joined}"] if numbers else []
    return ", ".join([*layers, *others]) or "nothing of the model's own"


def amount(count: int) -> str:
    """A number of bytes in the unit that fits it."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:,.2f} {unit}"
    return f"{count / 2**10:,.1f} KiB"
