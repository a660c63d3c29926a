"""Layer importance: mean gradient norms, their refresh, and the resulting probabilities (paper, probing phase).

The paper gives the root mean square gradient per layer, its mean over the probing steps, softmax(m / tau) and an
exponential moving average. It gives neither tau nor the scaling of m. For raw values, which are 1e-6 to 1e-3,
softmax(m / 1) is uniform to three digits, so scaling m by its mean is *our* default, named in every record. Scaled
so, a fixed tau still fits no two models, so our default tau is the one that gives a wanted effective number of layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from grass.host import current

Norm = Literal["none", "mean", "sum", "max", "zscore"]

SAME = 1e-6
"""Mean gradient norms that differ by less, relative to the largest, are equal: rounding of fp32 norms reaches that."""


def gradient_square(parameters: Sequence[nn.Parameter]) -> Tensor | None:
    """Sum of squared gradient entries, fp32 scalar on the gradients' device; None if no parameter has a gradient."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in parameters if p.grad is not None]
    return torch.stack(norms).square().sum() if norms else None


def gradient_norms(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """2-norm of each parameter's gradient, scalars on its device; in fp32 if any gradient has a lower precision."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    low = any(g.dtype in (torch.bfloat16, torch.float16) for g in gradients)
    return list(torch._foreach_norm(gradients, 2, dtype=torch.float32 if low else None))


def root_mean_square(square: Tensor, count: int) -> Tensor:
    """R = sqrt(||g||^2 / N): the root mean square of a layer's `count` gradient entries (paper, mean gradient norm)."""
    return (square / count).sqrt()


def normalise(values: Sequence[float], norm: Norm) -> list[float]:
    """Scale mean gradient norms before the softmax.

    Args:
        values: one mean gradient norm a layer, all finite, none negative.
        norm: `none` leaves values as they are; `mean`, `sum` and `max` divide by that statistic; `zscore` centres and
            divides by the population standard deviation.

    Returns:
        Scaled values; all zero if the divisor would be 0 (all values are 0, or have no spread).
    """
    if norm == "none":
        return list(values)
    if norm == "zscore":
        mean = math.fsum(values) / len(values)
        spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))
        return [(v - mean) / spread if spread > 0 else 0.0 for v in values]
    scale = {"mean": math.fsum(values) / len(values), "sum": math.fsum(values), "max": max(values)}[norm]
    return [v / scale if scale > 0 else 0.0 for v in values]


def probabilities(values: Sequence[float], *, temperature: float, norm: Norm) -> list[float]:
    """P = softmax(normalised m / tau), in float64 (paper, layer sampling probability)."""
    with current().with_values():
        return torch.softmax(torch.tensor(normalise(values, norm), dtype=torch.float64) / temperature, 0).tolist()


def effective_layers(probability: Sequence[float]) -> float:
    """exp(H(p)): L if p is uniform over L layers, 1 if one layer has all the probability."""
    return math.exp(-math.fsum(p * math.log(p) for p in probability if p > 0))


def temperature_for(values: Sequence[float], *, effective: float, norm: Norm, inverse: bool = False) -> float:
    """Temperature at which softmax of the scaled values has the wanted effective number of layers (ours).

    exp(H(p)) rises with tau, strictly unless all values are equal: from the number of layers that share the largest
    value, as tau goes to 0, to the number of all layers, as tau goes to infinity. So one tau gives the wanted number,
    found by bisection in float64. It does not change the result whether all gradients are multiplied by a factor, or
    which `norm` scales them: tau changes by that factor, the probabilities do not.

    Args:
        values: one mean gradient norm a layer, all finite, none negative.
        effective: wanted exp(H(p)), from 1 to the number of layers.
        norm: scaling before the softmax; it sets the unit of the temperature.
        inverse: solve for softmax(-m / tau).

    Returns:
        Temperature above 0. Infinite, so that probabilities are uniform, if all layers are wanted or all values are
        equal up to the rounding of fp32. If more layers than wanted share the largest value, a temperature at which
        these have all the probability in equal parts: no softmax has fewer effective layers.
    """
    if effective >= len(values) or max(values) - min(values) <= SAME * max(values):
        return math.inf
    scaled = [-v if inverse else v for v in normalise(values, norm)]
    below = [max(scaled) - v for v in scaled]  # softmax is the same for values shifted by a constant
    # at these ends p is that of the limits, to the precision of float64
    low, high = (math.log(end) for end in (min(d for d in below if d > 0) / 64, max(below) * 2**20))
    # logarithms, because the ends may be hundreds of decades apart; 100 halvings leave less than a rounding of that
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _effective_at(below, math.exp(middle)) < effective else (low, middle)
    return math.exp(high)


def _effective_at(below: Sequence[float], temperature: float) -> float:
    """exp(H(p)) of softmax(-below / temperature); the smallest entry of `below` is 0."""
    exponents = [max(-d / temperature, -745.0) for d in below]  # exp(-745) is the smallest number above 0
    weights = [math.exp(x) for x in exponents]
    total = math.fsum(weights)
    return total * math.exp(-math.fsum(w * x for w, x in zip(weights, exponents, strict=True)) / total)


@dataclass
class Importance:
    """Mean gradient norm of every layer, and when each was last measured."""

    values: list[float]
    """m_l, float64, one a layer; nan for a layer that the user froze."""
    measured_at: list[int]
    """Step count after which each value was last measured; 0 for probing."""

    @classmethod
    def from_probe(cls, means: Sequence[float]) -> Importance:
        """Start from the probing phase's means.

        Raises:
            ValueError: a mean is not finite; the layer is named.
        """
        for layer, mean in enumerate(means):
            if not math.isfinite(mean):
                raise ValueError(
                    f"probing: the gradient norm of layer {layer} is {mean}; check the loss and the weights"
                )
        return cls(list(means), [0] * len(means))

    def measured(self) -> tuple[float | None, ...]:
        """`values`, with None for layers that are never measured."""
        return tuple(None if math.isnan(value) else value for value in self.values)

    def refresh(self, measured: Mapping[int, float], *, ema: float, step: int) -> None:
        """m_l = ema * new + (1 - ema) * m_l for every measured layer; the others keep their value (paper, refresh).

        Args:
            measured: by layer, the mean of r over the window's steps in which the layer was active.
            ema: alpha, the weight of the *new* measurement.
            step: steps done so far.
        """
        for layer, new in measured.items():
            self.values[layer] = ema * new + (1 - ema) * self.values[layer]
            self.measured_at[layer] = step
