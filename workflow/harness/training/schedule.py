"""The learning-rate schedule, as a factor of every group's own rate."""

from __future__ import annotations

import math

from baselines.method import Recipe


def lr_factor(step: int, recipe: Recipe) -> float:
    """Factor for optimizer step `step` (from 0): linear warm-up, then linear, cosine or no decay.

    The factor is never 0: it is 1 / warmup_steps in the first warm-up step, and above 0 in the last step of a decay, so
    that every step changes the weights that the method promised to train.
    """
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)
    if recipe.schedule == "linear":
        return 1 - done
    if recipe.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0
