"""Which layers train next: the paper's draw by importance, and controls that isolate its benefit.

importance  by p = softmax(m / tau), refreshed as training goes (paper)
static      by p of the probing phase throughout (paper's GRASS*)
uniform     every layer with equal probability, as in LISA
inverse     by softmax(-m / tau): the least important layers first
topk        the gamma most important layers, without randomness
fixed       one random set throughout
age         by the number of steps since a layer last trained, whatever its gradients
cyclic      each layer once, in shuffled order, then shuffled again
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch

from grass.host import current
from grass.importance import Norm, probabilities

Sampler = Literal["importance", "uniform", "inverse", "topk", "fixed", "static", "age", "cyclic"]

NEEDS_PROBE = frozenset({"importance", "inverse", "topk", "static"})
"""Samplers that need mean gradient norms before their first draw."""
REFRESHES = frozenset({"importance", "inverse", "topk"})
"""Samplers whose probabilities are refreshed from the gradients of training."""
BY_TEMPERATURE = frozenset({"importance", "inverse", "static"})
"""Samplers whose probabilities are a softmax over a temperature."""


def draw_layers(probability: Sequence[float], count: int, generator: torch.Generator) -> tuple[int, ...]:
    """Draw `count` distinct layers; the current host may override the draw (see `grass.host`).

    The paper does not say whether draws are with replacement. Ours are without: one layer after the other, with the
    remaining probabilities renormalised. Adding Gumbel noise to log p and taking the `count` largest has exactly that
    distribution, and works in log space, so that a layer whose probability underflows float64 can still be drawn.

    Args:
        probability: one non-negative number per layer; need not sum to 1.
        count: from 1 to the number of layers.
        generator: the caller's own CPU generator, never the global one.

    Returns:
        Layer numbers in ascending order.

    Raises:
        ValueError: `count` is out of range.
    """
    if not 1 <= count <= len(probability):
        raise ValueError(f"active_layers must be from 1 to {len(probability)} (the model's layers), not {count}")
    return current().draw(len(probability), count, lambda: _draw_by(probability, count, generator))


def _draw_by(probability: Sequence[float], count: int, generator: torch.Generator) -> tuple[int, ...]:
    uniform = torch.rand(len(probability), dtype=torch.float64, generator=generator)
    smallest = math.log(torch.finfo(torch.float64).tiny)
    log_p = torch.tensor([math.log(p) if p > 0 else smallest for p in probability], dtype=torch.float64)
    keys = log_p - (-uniform.clamp_min(torch.finfo(torch.float64).tiny).log()).log()
    return tuple(sorted(keys.topk(count).indices.tolist()))


class LayerSampler:
    """Draws of one run: the current probabilities, the generator, and the state of the controls."""

    def __init__(self, kind: Sampler, *, layers: int, active_layers: int, seed: int) -> None:
        self.kind = kind
        self.layers = layers
        self.active_layers = active_layers
        self.generator = torch.Generator().manual_seed(seed)
        self.probability = [1 / layers] * layers
        """p of the next single draw, one per layer, summing to 1. `topk` and `fixed`: 1/gamma for the chosen layers."""
        self._trained_until = [0] * layers
        """`age`: steps done when each layer last trained."""
        self._queue: list[int] = []
        """`cyclic`: layers still to come in this round."""

    @property
    def needs_probe(self) -> bool:
        """Whether mean gradient norms are needed before the first draw that is used for training."""
        return self.kind in NEEDS_PROBE

    @property
    def refreshes(self) -> bool:
        """Whether probabilities are refreshed from the gradients of training."""
        return self.kind in REFRESHES

    def follow(self, importance: Sequence[float], *, temperature: float, norm: Norm) -> None:
        """Set probabilities from new mean gradient norms, one per layer; no effect on samplers that measure nothing."""
        if self.kind in ("importance", "static"):
            self.probability = probabilities(importance, temperature=temperature, norm=norm)
        elif self.kind == "inverse":
            # softmax(-m / tau): m is normalised before the sign change, since negative values would be scaled
            # differently
            self.probability = probabilities(importance, temperature=-temperature, norm=norm)
        elif self.kind == "topk":
            largest = sorted(range(self.layers), key=lambda layer: (-importance[layer], layer))
            self._put_all_on(largest[: self.active_layers])

    def draw(self, *, steps: int, trained: Sequence[int]) -> tuple[int, ...]:
        """The next active set, ascending.

        Args:
            steps: optimizer steps done so far.
            trained: layers that trained in the period that ends.
        """
        for layer in trained:
            self._trained_until[layer] = steps
        if self.kind == "age":
            ages = [1 + steps - until for until in self._trained_until]
            self.probability = [age / sum(ages) for age in ages]
        if self.kind == "cyclic":
            return current().draw(self.layers, self.active_layers, self._next_of_cycle)
        drawn = draw_layers(self.probability, self.active_layers, self.generator)
        if self.kind == "fixed":
            self._put_all_on(drawn)
        return drawn

    def _put_all_on(self, chosen: Sequence[int]) -> None:
        # exact zeros elsewhere, so a draw takes exactly the chosen layers
        self.probability = [1 / len(chosen) if layer in chosen else 0.0 for layer in range(self.layers)]

    def _next_of_cycle(self) -> tuple[int, ...]:
        drawn = self._queue[: self.active_layers]
        self._queue = self._queue[self.active_layers :]
        while len(drawn) < self.active_layers:
            order = torch.randperm(self.layers, generator=self.generator).tolist()
            # a set that spans two rounds must be distinct, so layers that it already holds go to the end of the new
            # round
            fresh = [layer for layer in order if layer not in drawn]
            missing = self.active_layers - len(drawn)
            self._queue = fresh[missing:] + [layer for layer in order if layer in drawn]
            drawn += fresh[:missing]
        return tuple(sorted(drawn))

    def state_dict(self) -> dict[str, Any]:
        """Everything the next draws depend on."""
        return {
            "probability": list(self.probability),
            "generator": self.generator.get_state(),
            "trained_until": list(self._trained_until),
            "queue": list(self._queue),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; a generator state on another device is copied to the CPU."""
        self.probability = list(state["probability"])
        self.generator.set_state(state["generator"].cpu())
        self._trained_until = list(state["trained_until"])
        self._queue = list(state["queue"])


def warn_if_not_adaptive(sampler: LayerSampler, effective: float, *, target: float | None, when: str) -> bool:
    """Warn if drawing by importance amounts to uniform draws or to a fixed set; return whether it warned.

    Args:
        sampler: with its current probabilities.
        effective: their effective number of layers.
        target: the option, if it sets the temperature; None with a temperature of the user's.
        when: end of the sentence that says what was found.
    """
    if sampler.kind not in BY_TEMPERATURE:
        return False
    layers, active = sampler.layers, sampler.active_layers
    if effective > 0.95 * layers:
        found = f"is near uniform: {effective:.2f} of {layers} layers effective"
        if target is None:
            mend = "lower `temperature`, or set it to 'auto'"
        elif target > 0.95:
            mend = "lower `target`"
        elif active + 1 > 0.95 * layers:
            mend = "lower `active_layers`, which leaves nothing to choose,"
        else:
            warnings.warn(f"GRASS {found} {when}: all layers have the same mean gradient norm", stacklevel=4)
            return True
    elif effective < active + 1 and layers > active:
        found = f"has collapsed: {effective:.2f} effective layers, {active} active"
        mend = "raise `temperature`, or set it to 'auto'"
    else:
        return False
    warnings.warn(f"GRASS {found} {when}; {mend} to change that", stacklevel=4)
    return True
