"""Activation checkpointing for as long as a probe lasts.

A probe differentiates every layer, and a layer that is differentiated keeps more activations than a sleeping one: in a
model without checkpointing a probe would peak above any step of training. Recomputing activations costs it one more
forward pass and brings its peak below an ordinary step's; gradients are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from grass.backward import stop_at_lowest_layer


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Checkpoint the decoder layers of a Hugging Face model; any other, or one that does it already, is left alone."""
    can: bool = getattr(model, "supports_gradient_checkpointing", False) and model.training
    if not can or getattr(model, "is_gradient_checkpointing", False):
        yield
        return
    config: Any = getattr(model, "config", None)
    caches = getattr(config, "use_cache", None)
    if caches:
        # a cache of keys and values is of no use in training, and transformers would say so of every checkpointed layer
        config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    stop_at_lowest_layer(model)
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()  # type: ignore[operator]
        if caches:
            config.use_cache = caches
