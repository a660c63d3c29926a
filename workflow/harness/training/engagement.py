"""Did the method do what it promised? Judged from facts that it cannot word differently.

At the start and end of every period the harness fingerprints the weights of each decoder layer and of each group
outside the stack; just before the first update of a period it looks which gradients exist, just after it counts the
tensors alive. The verdict compares these with the method's `Expectation`. Three public ports of layer-wise methods,
which trained nothing or never let go of state, would have failed here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import permutations
from typing import Any

from torch import nn

from baselines.method import Expectation, LayerTrace, ModelFacts
from grass.layers import LayerMap
from harness.measuring.census import begin_census, fingerprint, live_bytes_outside
from harness.record import Check

GROUPS = ("embedding", "final_norm", "head")
STATE_SLACK_BYTES = 32 * 1024
"""Room for what is no moment: generators, importance windows, caches of the libraries."""
STATE_SLACK_SHARE = 0.02
CHANCE_LIMIT = 1e-6
"""A draw that repeats itself this improbably often is called a draw that never happened."""


@dataclass
class Period:
    """What was seen from the first step of a period to its last."""

    first_step: int
    last_step: int = -1
    moved_layers: list[int] = field(default_factory=list)
    moved_base: list[int] = field(default_factory=list)
    """Layers whose own weights moved, adapters left out."""
    moved_groups: list[str] = field(default_factory=list)
    graded_layers: list[int] = field(default_factory=list)
    graded_groups: list[str] = field(default_factory=list)
    graded_parameters: int = 0
    """Parameters that had a gradient just before the period's first update."""
    state_bytes: int = 0
    believed_active: list[int] | None = None
    believed_probability: list[float] | None = None


class Watch:
    """Looks at the model from outside. Create it before `attach`, call `attached` after."""

    def __init__(self, model: nn.Module, layers: LayerMap) -> None:
        self._layers = layers
        self._base = [list(parameters) for parameters in layers.layer_parameters()]
        self._groups = {key: list(layers.outside[key]) for key in GROUPS}
        self._model = model
        self._marks: dict[str, Any] = {}
        begin_census()
        self.periods: list[Period] = []

    def attached(self, model: nn.Module) -> None:
        """From here on `model` (perhaps wrapped) is what trains; adapters inside a layer belong to that layer."""
        self._model = model
        own = {id(p) for parameters in self._base for p in parameters}
        self._adapters = [[p for p in layer.parameters() if id(p) not in own] for layer in self._layers.layers]

    def start_period(self, step: int, trace: LayerTrace | None) -> None:
        """Before the first forward pass of `step`, after the method's own `begin_step`."""
        period = Period(first_step=step)
        if trace is not None:
            period.believed_active = list(trace.active)
            period.believed_probability = None if trace.probability is None else list(trace.probability)
        self.periods.append(period)
        self._marks = self._fingerprints()

    def before_update(self) -> None:
        """After the last backward of the period's first step: which gradients are there."""
        period = self.periods[-1]
        for layer, (base, adapters) in enumerate(zip(self._base, self._adapters, strict=True)):
            graded = [p for p in [*base, *adapters] if p.grad is not None]
            if graded:
                period.graded_layers.append(layer)
            period.graded_parameters += sum(p.numel() for p in graded)
        for key, parameters in self._groups.items():
            graded = [p for p in parameters if p.grad is not None]
            if graded:
                period.graded_groups.append(key)
            period.graded_parameters += sum(p.numel() for p in graded)

    def after_update(self) -> None:
        """After the period's first update: what is alive beside the model."""
        self.periods[-1].state_bytes = live_bytes_outside(self._model)

    def end_period(self, step: int) -> None:
        """After the last update of the period, `step`: what moved."""
        period, now = self.periods[-1], self._fingerprints()
        period.last_step = step
        layers = range(len(self._base))
        period.moved_base = [i for i in layers if now[f"base {i}"] != self._marks[f"base {i}"]]
        moved_adapters = {i for i in layers if now[f"adapter {i}"] != self._marks[f"adapter {i}"]}
        period.moved_layers = sorted(moved_adapters | set(period.moved_base))
        period.moved_groups = [key for key in GROUPS if now[key] != self._marks[key]]

    def state_dict(self) -> dict[str, Any]:
        """For the resume state."""
        return {"periods": [asdict(p) for p in self.periods], "marks": self._marks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.periods = [Period(**p) for p in state["periods"]]
        self._marks = state["marks"]

    def _fingerprints(self) -> dict[str, Any]:
        marks: dict[str, Any] = {key: fingerprint(parameters) for key, parameters in self._groups.items()}
        for layer, (base, adapters) in enumerate(zip(self._base, self._adapters, strict=True)):
            marks[f"base {layer}"], marks[f"adapter {layer}"] = fingerprint(base), fingerprint(adapters)
        return marks


def verdict(
    promise: Expectation, facts: ModelFacts, periods: Sequence[Period], *, coarse_weights: bool = False
) -> list[Check]:
    """Every promise beside what was seen; the run is engaged if all are ok.

    Args:
        promise: the method's.
        facts: the model's, taken by the harness before the method touched it.
        periods: finished periods only; none at all fails, unless nothing was promised to move.
        coarse_weights: bf16 weights; a final norm, a few entries near 1, may then get gradients and never move.
    """
    checks = [_layers_moved(promise, facts, periods), _groups_moved(promise, facts, periods, coarse_weights)]
    if promise.layers != "none":
        checks += [_gradients(promise, facts, periods), _trainable(promise, periods)]
    checks.append(_state(promise, facts, periods))
    if promise.layers == "sampled":
        checks += [_belief(periods), _rotation(promise, facts, periods)]
    if promise.base_frozen:
        moved = sorted({layer for p in periods for layer in p.moved_base})
        checks.append(
            Check(
                name="base weights frozen",
                promised="bitwise equal",
                observed=f"moved: {moved}" if moved else "bitwise equal",
                ok=not moved,
            )
        )
    return checks


def _layers_moved(promise: Expectation, facts: ModelFacts, periods: Sequence[Period]) -> Check:
    count = {"none": 0, "all": facts.layers, "sampled": promise.active_layers}[promise.layers]
    seen = sorted({len(p.moved_layers) for p in periods})
    ok = (bool(periods) or promise.layers == "none") and all(n == count for n in seen)
    return Check(
        name="layers that moved",
        promised=f"{count} in every period",
        observed=f"{seen} in {len(periods)} periods",
        ok=ok,
    )


def _groups_moved(promise: Expectation, facts: ModelFacts, periods: Sequence[Period], coarse_weights: bool) -> Check:
    promised = _promised_groups(promise, facts)
    seen = {tuple(p.moved_groups) for p in periods}
    allowed = {tuple(promised)}
    if coarse_weights:
        allowed.add(tuple(key for key in promised if key != "final_norm"))
    return Check(
        name="groups outside the layers that moved",
        promised=", ".join(promised) or "none",
        observed=" / ".join(", ".join(s) or "none" for s in sorted(seen)) or "none",
        ok=seen <= allowed,
    )


def _gradients(promise: Expectation, facts: ModelFacts, periods: Sequence[Period]) -> Check:
    groups = _promised_groups(promise, facts)
    wrong = [p.first_step for p in periods if p.graded_layers != p.moved_layers or p.graded_groups != groups]
    return Check(
        name="gradients exist for what moves, and for nothing else",
        promised="at every period's first step",
        observed=f"differs at steps {wrong}" if wrong else "so",
        ok=not wrong,
    )


def _trainable(promise: Expectation, periods: Sequence[Period]) -> Check:
    seen = max((p.graded_parameters for p in periods), default=0)
    return Check(
        name="trainable parameters in one step",
        promised=f"{promise.trainable_parameters:,}",
        observed=f"{seen:,}",
        ok=seen == promise.trainable_parameters,
    )


def _state(promise: Expectation, facts: ModelFacts, periods: Sequence[Period]) -> Check:
    outside_layers = _outside_parameters(promise, facts)
    visited: set[int] = set()
    worst, ok = "as promised", True
    for period in periods:
        visited |= set(period.moved_layers)
        if promise.layers == "all":
            parameters = promise.trainable_parameters
        else:
            with_state = {"none": set(), "active": set(period.moved_layers), "visited": visited}[promise.state_of]
            parameters = outside_layers + sum(facts.layer_parameters[i] for i in with_state)
        promised = parameters * promise.state_bytes_per_parameter if promise.state_of != "none" else 0
        slack = STATE_SLACK_BYTES + STATE_SLACK_SHARE * promised
        if ok and abs(period.state_bytes - promised) > slack:
            ok = False
            worst = f"{period.state_bytes:,} where {promised:,} were promised, at step {period.first_step}"
    return Check(
        name="live optimizer-state bytes",
        promised=f"{promise.state_bytes_per_parameter} bytes a parameter of what is {promise.state_of}"
        if promise.state_of != "none"
        else "none",
        observed=worst,
        ok=ok,
    )


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
    if len(distinct) > 1 or promise.active_layers == facts.layers or not periods:
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

    Exact up to 6 layers; above, the most probable order times the number of orders, an upper bound.
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


def _outside_parameters(promise: Expectation, facts: ModelFacts) -> int:
    sizes = {
        "embedding": facts.embedding_parameters,
        "final_norm": facts.final_norm_parameters,
        "head": facts.head_parameters,
    }
    return sum(size for key, size in sizes.items() if getattr(promise, key))
