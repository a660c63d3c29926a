"""Did the method do what it promised? Compares its `Expectation` with the facts of `harness.training.engagement`.

Three public ports of layer-wise methods, which trained nothing or never released state, would have failed here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import permutations

from baselines.method import Expectation, ModelFacts
from harness.records.run import Check
from harness.training.engagement import GROUPS, Period

STATE_SLACK_BYTES = 32 * 1024
"""Allowance for state other than moments: generators, importance windows, caches of libraries."""
STATE_SLACK_SHARE = 0.02
CHANCE_LIMIT = 1e-6
"""If repeating the same draw so often is less likely than this, the method is judged not to draw at all."""


def verdict(
    promise: Expectation, facts: ModelFacts, periods: Sequence[Period], *, bf16_weights: bool = False
) -> list[Check]:
    """Check every promise against the observations; the run is engaged if all checks are ok.

    Args:
        promise: the method's.
        facts: the model's, taken by the harness before the method touched it.
        periods: finished periods only; none at all fails, unless nothing was promised to move.
        bf16_weights: weights are bf16; a final norm, with few entries near 1, may then get gradients and never move.
    """
    if promise.layers == "chosen":
        checks = [_tensors_moved(periods, bf16_weights)]
    else:
        checks = [_layers_moved(promise, facts, periods), _groups_moved(promise, facts, periods, bf16_weights)]
    if promise.layers != "none" and promise.gradients == "kept":
        checks += [_gradients(promise, facts, periods), _trainable(promise, facts, periods)]
    elif promise.gradients == "consumed":
        checks.append(_no_gradient_left(periods))
    checks.append(_state(promise, facts, periods))
    if promise.layers == "sampled":
        checks += [_belief(periods), _rotation(promise, facts, periods)]
    elif promise.layers == "chosen":
        checks.append(_chosen_rotates(promise, periods))
    if promise.base_frozen:
        moved = sorted({str(part) for p in periods for part in (*p.moved_base, *p.moved_base_groups)})
        checks.append(
            Check(
                name="base weights frozen",
                promised="bitwise equal",
                observed=f"moved: {', '.join(moved)}" if moved else "bitwise equal",
                ok=not moved,
            )
        )
    return checks


def _layers_moved(promise: Expectation, facts: ModelFacts, periods: Sequence[Period]) -> Check:
    trained = promise.layer_trained_parameters or facts.layer_parameters
    count = {"none": 0, "all": sum(n > 0 for n in trained), "sampled": promise.active_layers}[promise.layers]
    seen = sorted({len(p.moved_layers) for p in periods})
    ok = (bool(periods) or promise.layers == "none") and all(n == count for n in seen)
    return Check(
        name="layers that moved",
        promised=f"{count} in every period",
        observed=f"{seen} in {len(periods)} periods",
        ok=ok,
    )


def _tensors_moved(periods: Sequence[Period], bf16_weights: bool) -> Check:
    def differs(period: Period) -> bool:
        moved, believed = set(period.moved_tensors), set(period.believed_tensors or ())
        return not moved <= believed or (not moved if bf16_weights else moved != believed)

    wrong = [p for p in periods if differs(p)]
    observed = f"so in {len(periods)} periods"
    if wrong:
        moved, believed = set(wrong[0].moved_tensors), set(wrong[0].believed_tensors or ())
        some = ", ".join(sorted(moved ^ believed)[:3])
        observed = (
            f"differs in {len(wrong)} of {len(periods)} periods; from step {wrong[0].first_step} on {len(moved)} moved "
            f"where {len(believed)} were named, {len(moved ^ believed)} apart: {some}"
        )
    return Check(
        name="tensors that moved are those the method names",
        promised="in every period",
        observed=observed,
        ok=bool(periods) and not wrong,
    )


def _no_gradient_left(periods: Sequence[Period]) -> Check:
    most = max((p.graded_parameters for p in periods), default=0)
    return Check(
        name="gradients are used up in backward",
        promised="none left at any period's first update",
        observed=f"of {most:,} parameters",
        ok=bool(periods) and most == 0,
    )


def _chosen_rotates(promise: Expectation, periods: Sequence[Period]) -> Check:
    distinct = len({tuple(p.believed_tensors or ()) for p in periods})
    return Check(
        name="the chosen set rotates",
        promised="new choices" if promise.rotates else "may stay",
        observed=f"{distinct} distinct sets in {len(periods)} periods",
        ok=distinct > 1 or len(periods) < 2 or not promise.rotates,
    )


def _groups_moved(promise: Expectation, facts: ModelFacts, periods: Sequence[Period], bf16_weights: bool) -> Check:
    promised = _promised_groups(promise, facts)
    seen = {tuple(p.moved_groups) for p in periods}
    allowed = {tuple(promised)}
    if bf16_weights:
        allowed.add(tuple(key for key in promised if key != "final_norm"))
    return Check(
        name="groups outside the layers that moved",
        promised=", ".join(promised) or "none",
        observed=" / ".join(", ".join(s) or "none" for s in sorted(seen)) or "none",
        ok=seen <= allowed,
    )


def _gradients(promise: Expectation, facts: ModelFacts, periods: Sequence[Period]) -> Check:
    groups = _promised_groups(promise, facts)
    if promise.layers == "chosen":
        wrong = [p.first_step for p in periods if p.graded_tensors != p.believed_tensors]
    else:
        wrong = [p.first_step for p in periods if p.graded_layers != p.moved_layers or p.graded_groups != groups]
    return Check(
        name="gradients exist for what moves, and for nothing else",
        promised="at every period's first step",
        observed=f"differs at steps {wrong}" if wrong else "so",
        ok=not wrong,
    )


def _trainable(promise: Expectation, facts: ModelFacts, periods: Sequence[Period]) -> Check:
    if promise.layers == "sampled":
        return _trainable_of_drawn(promise, facts, periods)
    seen = max((p.graded_parameters for p in periods), default=0)
    bound = promise.layers == "chosen"
    return Check(
        name="trainable parameters in one step",
        promised=f"{'at most ' if bound else ''}{promise.trainable_parameters:,}",
        observed=f"{seen:,}{_without_gradient(periods)}" if seen < promise.trainable_parameters else f"{seen:,}",
        ok=0 < seen <= promise.trainable_parameters if bound else seen == promise.trainable_parameters,
    )


def _without_gradient(periods: Sequence[Period]) -> str:
    """Names of some parameters that were to train and got no gradient: a model may use a weight without its module."""
    names = next((period.ungraded for period in periods if period.ungraded), [])
    return f"; no gradient reached {', '.join(names)}" if names else ""


def _trainable_of_drawn(promise: Expectation, facts: ModelFacts, periods: Sequence[Period]) -> Check:
    """Layers may differ in size, so each period is held to the layers that moved in it."""
    layers = promise.layer_trained_parameters or facts.layer_parameters
    outside = facts.outside_parameters(embedding=promise.embedding, head=promise.head, final_norm=promise.final_norm)
    most = sum(sorted(layers)[-(promise.active_layers or 0) :]) + outside
    wanted = [sum(layers[layer] for layer in period.moved_layers) + outside for period in periods]
    wrong = [(p, count) for p, count in zip(periods, wanted, strict=True) if p.graded_parameters != count]
    observed = f"at most {max((p.graded_parameters for p in periods), default=0):,}"
    if wrong:
        period, count = wrong[0]
        observed = (
            f"{period.graded_parameters:,} where {count:,} belong to what moved, at step {period.first_step}"
            f"{_without_gradient([period])}"
        )
    elif most != promise.trainable_parameters:
        observed = f"{most:,} in the largest draw"
    return Check(
        name="trainable parameters in one step",
        promised=f"those of what is drawn, at most {promise.trainable_parameters:,}",
        observed=observed,
        ok=bool(periods) and not wrong and most == promise.trainable_parameters,
    )


def _state(promise: Expectation, facts: ModelFacts, periods: Sequence[Period]) -> Check:
    law = _StateLaw(promise, facts)
    observed, ok = "as promised", True
    for period in periods:
        promised = law.after(period)
        slack = STATE_SLACK_BYTES + STATE_SLACK_SHARE * promised
        if ok and abs(period.state_bytes - promised) > slack:
            ok = False
            observed = f"{period.state_bytes:,} where {promised:,} were promised, at step {period.first_step}"
    return Check(name="live optimizer-state bytes", promised=law.words(), observed=observed, ok=ok)


class _StateLaw:
    """Bytes of state that a promise allows after each period, in order."""

    def __init__(self, promise: Expectation, facts: ModelFacts) -> None:
        self.promise = promise
        self.layers = promise.layer_state_bytes or promise.state_bytes_of_layers(facts)
        self.outside = promise.state_bytes_outside(facts)
        self.sizes = facts.tensor_parameters
        self.visited: set[int] = set()
        self.visited_tensors: set[str] = set()

    def after(self, period: Period) -> int:
        """Bytes promised at the end of the period's first update; call it for the periods in order."""
        promise = self.promise
        self.visited |= set(period.moved_layers)
        self.visited_tensors |= set(period.believed_tensors or ())
        if promise.state_of == "none":
            return 0
        if promise.state_of == "constant":
            assert promise.state_bytes is not None
            return promise.state_bytes
        if promise.state_in_8_bits and promise.layers == "all":
            return self.outside + sum(self.layers)
        if promise.layers == "all":
            return promise.trainable_parameters * promise.state_bytes_per_parameter
        if promise.layers == "chosen":
            names = self.visited_tensors if promise.state_of == "visited" else set(period.believed_tensors or ())
            return sum(self.sizes[name] for name in names) * promise.state_bytes_per_parameter
        layers = self.visited if promise.state_of == "visited" else set(period.moved_layers)
        return self.outside + sum(self.layers[layer] for layer in layers)

    def words(self) -> str:
        """The promise in words, for the record."""
        promise = self.promise
        if promise.state_of == "none":
            return "none"
        if promise.state_of == "constant":
            return f"{promise.state_bytes:,} at any time"
        if promise.layer_state_bytes is not None:
            return f"{max(self.layers):,} or fewer a layer of what is {promise.state_of}"
        each = f"{promise.state_bytes_per_parameter} bytes a parameter of what is {promise.state_of}"
        return f"{each}; larger tensors in 8 bits" if promise.state_in_8_bits else each


def _belief(periods: Sequence[Period]) -> Check:
    wrong = [p.first_step for p in periods if p.believed_active is None or sorted(p.believed_active) != p.moved_layers]
    return Check(
        name="layers that moved are those the method says",
        promised="in every period",
        observed=f"differs from step {wrong[0]} on, in {len(wrong)} periods" if wrong else "so",
        ok=not wrong,
    )


def _rotation(promise: Expectation, facts: ModelFacts, periods: Sequence[Period]) -> Check:
    distinct = {tuple(p.moved_layers) for p in periods}
    observed = f"{len(distinct)} distinct sets in {len(periods)} periods"
    if len(distinct) > 1 or promise.active_layers == facts.layers or not periods or not promise.rotates:
        return Check(name="the active set rotates", promised="new draws", observed=observed, ok=True)
    chance = 1.0
    for period in periods[1:]:
        chance *= chance_of_set(period.believed_probability or [1 / facts.layers] * facts.layers, period.moved_layers)
    return Check(
        name="the active set rotates",
        promised="new draws",
        observed=f"{observed}; chance of that under the method's own probabilities {chance:.1e}",
        ok=chance >= CHANCE_LIMIT,
    )


def chance_of_set(probability: Sequence[float], drawn: Sequence[int]) -> float:
    """Probability that successive draws without replacement give exactly this set, in any order.

    Exact up to 6 layers; above, an upper bound: the probability of the likeliest order times the number of orders.
    """

    def in_order(order: Sequence[int]) -> float:
        left, chance = math.fsum(probability), 1.0
        for layer in order:
            if left <= 0:
                return 0.0
            chance *= min(1.0, probability[layer] / left)
            left -= probability[layer]
        return chance

    if len(drawn) <= 6:
        return min(1.0, math.fsum(in_order(order) for order in permutations(drawn)))
    ascending = sorted(drawn, key=lambda layer: -probability[layer])
    return min(1.0, in_order(ascending) * math.factorial(len(drawn)))


def _promised_groups(promise: Expectation, facts: ModelFacts) -> list[str]:
    sizes = {
        "embedding": facts.embedding_parameters,
        "final_norm": facts.final_norm_parameters,
        "head": facts.head_parameters,
    }
    return [key for key in GROUPS if getattr(promise, key) and sizes[key]]
