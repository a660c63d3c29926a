"""Draws of distinct layers: successive draws by probability with renormalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def draw_layers(probability: Sequence[float], count: int, generator: torch.Generator) -> tuple[int, ...]:
    """Draw `count` distinct layers.

    The paper does not say whether draws are with replacement; ours are without, one after the other with the rest
    renormalised. Adding Gumbel noise to log p and taking the `count` largest has exactly that law, and works in log
    space, so that a probability too small for float64 can still fill an empty place.

    Args:
        probability: one non-negative number a layer; need not sum to 1.
        count: from 1 to the number of layers.
        generator: a CPU generator of the caller's own, never the global one.

    Returns:
        Layer numbers in ascending order.

    Raises:
        ValueError: `count` is out of range.
    """
    if not 1 <= count <= len(probability):
        raise ValueError(f"active_layers must be from 1 to {len(probability)} (the model's layers), not {count}")
    uniform = torch.rand(len(probability), dtype=torch.float64, generator=generator)
    smallest = math.log(torch.finfo(torch.float64).tiny)
    log_p = torch.tensor([math.log(p) if p > 0 else smallest for p in probability], dtype=torch.float64)
    keys = log_p - (-uniform.clamp_min(torch.finfo(torch.float64).tiny).log()).log()
    return tuple(sorted(keys.topk(count).indices.tolist()))
