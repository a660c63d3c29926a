"""The paper's premise in claims that can fail: importance differs by task and by stage, and enough to matter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from harness.reporting.drift import Drift
from harness.reporting.importance_stats import Estimate, effective_numbers, estimate, resampled
from harness.reporting.probed import ALIKE, PLAIN, SAMPLERS, OfTask, Pair, Sampler
from harness.reporting.stats import MIN_SEEDS
from harness.reporting.table import number, percent

MOVED = 0.1
"""Ours: a difference matters to the sampler if it sends more than this share of draws to other layers."""
UNIFORM = 0.95
"""The sampler is uniform by another name if its effective number of layers is above this share of all layers."""
_UNOBSERVED = "of this study was observed over training"
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot tell"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One statement about one model."""

    claim: str
    verdict: str
    """`holds`, `does not hold` or `cannot tell`, and for how many."""
    numbers: str
    criterion: str


def claims(tasks: Mapping[str, OfTask], pairs: Sequence[Pair], drifts: Sequence[Drift]) -> list[Claim]:
    """Claims about one model: about tasks if any was probed, about draws by stage if any run was observed."""
    made: list[Claim] = []
    if tasks:
        made += [_order(pairs), *(_draws(pairs, sampler) for sampler in SAMPLERS)]
        made += [_uniform(tasks, sampler) for sampler in PLAIN]
    made.append(_stages(drifts))
    return made + ([_later_draws(drifts, sampler) for sampler in SAMPLERS] if drifts else [])


def _order(pairs: Sequence[Pair]) -> Claim:
    counted = Counter(pair.verdict for pair in pairs)
    if not pairs:
        verdict, numbers = f"{OPEN} (fewer than two tasks were probed)", ""
    else:
        verdict = HOLDS if counted["differ"] else FAILS if counted["alike"] == len(pairs) else OPEN
        numbers = (
            f"{counted['differ']} of {len(pairs)} pairs of tasks differ; rank correlation "
            f"{_span(pair.rho.value for pair in pairs)}; of halves of two tasks {_span(p.halves for p in pairs)}, of "
            f"two halves of one task {_span(p.ceiling for p in pairs)}"
        )
    return Claim(
        claim="the order of the layers differs between tasks",
        verdict=verdict,
        numbers=numbers,
        criterion="holds: p < 0.05 in at least one pair of tasks, by permutation of batches between the two, after "
        f"Holm's correction over the model's pairs. Does not hold: the interval of every pair's rank correlation lies "
        f"above {ALIKE:g}.",
    )


def _draws(pairs: Sequence[Pair], sampler: Sampler) -> Claim:
    moved = [pair.moved[sampler.key] for pair in pairs]
    noise = [pair.halves_moved[sampler.key] for pair in pairs]
    more = sum(m.low > max(MOVED, of_one) for m, of_one in zip(moved, noise, strict=True))
    less = sum(m.high < MOVED for m in moved)
    if not pairs:
        verdict, numbers = f"{OPEN} (fewer than two tasks were probed)", ""
    else:
        verdict = HOLDS if 2 * more >= len(pairs) else FAILS if less == len(pairs) else OPEN
        numbers = (
            f"{_span((m.value for m in moved), 100)} % of draws move to other layers with the other task's "
            f"probabilities ({_span(noise, 100)} % between two halves of one "
            f"task); surely more than {percent(MOVED, 0)} in {more} of {len(pairs)} pairs, surely less in {less}"
        )
    return Claim(
        claim=f"which layers are drawn depends on the task, {sampler.name}",
        verdict=verdict,
        numbers=numbers,
        criterion=f"holds: in at least half of the pairs of tasks more than {percent(MOVED, 0)} of draws move, and "
        "more than between two halves of one task (the whole interval). Does not hold: fewer than "
        f"{percent(MOVED, 0)} in every pair (the whole interval).",
    )


def effective(task: OfTask, sampler: Sampler) -> Estimate:
    """Effective number of layers of one task's probabilities."""
    layers = task.norms.shape[1]
    drawn = effective_numbers(sampler.probabilities(resampled(task.norms, 0)))
    value = float(effective_numbers(sampler.probabilities(task.relative)))
    return estimate(value, drawn, least=1.0, most=float(layers))


def _uniform(tasks: Mapping[str, OfTask], sampler: Sampler) -> Claim:
    shares = [
        Estimate(value=found.value / layers, low=found.low / layers, high=found.high / layers)
        for task in tasks.values()
        for found, layers in [(effective(task, sampler), task.norms.shape[1])]
    ]
    above, below = sum(s.low > UNIFORM for s in shares), sum(s.high < UNIFORM for s in shares)
    some = f"{HOLDS} in {above} of {len(shares)} tasks" if above else OPEN
    verdict = HOLDS if above == len(shares) else FAILS if below == len(shares) else some
    numbers = f"effective layers {_span((s.value for s in shares), 100)} % of all"
    return Claim(
        claim=f"the sampler is uniform by another name, {sampler.name}",
        verdict=verdict,
        numbers=numbers,
        criterion=f"holds: the effective number of layers, exp of the entropy, is above {percent(UNIFORM, 0)} of all "
        "layers in every task (the whole interval). Does not hold: below in every task.",
    )


def _stages(drifts: Sequence[Drift]) -> Claim:
    counted = Counter(drift.verdict.partition(" (")[0] for drift in drifts)
    if not drifts:
        verdict, numbers = f"{OPEN} (no run {_UNOBSERVED})", ""
    else:
        verdict = HOLDS if counted["changes"] else FAILS if counted["keeps"] == len(drifts) else OPEN
        last = [rho for drift in drifts for rho in drift.last]
        noise = [float(drift.noise.rho.mean()) for drift in drifts if drift.noise is not None]
        numbers = (
            f"{counted['changes']} of {len(drifts)} (method, task) change; rank correlation of the last step with step "
            f"0 {_span(last)}" + (f", of two choices of rows at step 0 {_span(noise)}" if noise else "")
        )
    return Claim(
        claim="the order of the layers changes over training",
        verdict=verdict,
        numbers=numbers,
        criterion="holds: for at least one method and task, in three seeds or more, all seeds have changed more from "
        "step 0 than two choices of as many rows differ at step 0 (p < 0.05 after Holm's correction over the model's "
        f"methods and tasks). Does not hold: every rank correlation is above {ALIKE:g}.",
    )


def _later_draws(drifts: Sequence[Drift], sampler: Sampler) -> Claim:
    key = sampler.key
    known = [drift for drift in drifts if len(drift.last) >= MIN_SEEDS and drift.noise is not None]
    more = sum(min(d.moved[key]) > max(MOVED, float(np.quantile(d.noise.moved[key], 0.95))) for d in known if d.noise)
    less = sum(max(d.moved[key]) < MOVED for d in known)
    if not known:
        verdict, numbers = f"{OPEN} (no run of {MIN_SEEDS} seeds with a probe beside it)", ""
    else:
        verdict = HOLDS if 2 * more >= len(known) else FAILS if less == len(known) else OPEN
        noise = _span((float(d.noise.moved[key].mean()) for d in known if d.noise), 100)
        numbers = (
            f"{_span((share for d in known for share in d.moved[key]), 100)} % of draws move to other layers from step "
            f"0 to the last ({noise} % between two choices of rows at step 0); surely in {more} of {len(known)} "
            f"(method, task), fewer than {percent(MOVED, 0)} in {less}"
        )
    return Claim(
        claim=f"which layers are drawn depends on the stage, {sampler.name}",
        verdict=verdict,
        numbers=numbers,
        criterion=f"holds: for at least half of the methods and tasks more than {percent(MOVED, 0)} of draws move from "
        "the observer's norms at step 0 to those at the last step, with each of three seeds or more, and more than "
        "between 95 % of two choices of as many rows at step 0. Does not hold: fewer for all of them, with every seed.",
    )


def _span(values: Iterable[float], factor: float = 1.0) -> str:
    known = [factor * value for value in values]
    digits = 1 if factor > 1 else 2
    low, high = number(min(known), digits), number(max(known), digits)
    return low if low == high else f"{low} to {high}"
