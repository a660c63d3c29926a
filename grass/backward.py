"""Where backward stops, and what it recomputes.

Backward need not visit the layers below the lowest trainable one. During a probe, decoder layers are checkpointed: a
probe differentiates every layer, and such a layer keeps more activations than a frozen one, so without checkpointing a
probe would peak above any training step. Recomputing activations costs the probe one more forward pass and brings its
peak below that of an ordinary step; gradients are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from grass.layers import declared_module


def stop_at_lowest_layer(model: nn.Module) -> None:
    """Remove the hook that makes the embedding's output require a gradient; for models with a frozen embedding.

    transformers 5 registers that hook in every `gradient_checkpointing_enable()`
    (`PreTrainedModel.enable_input_require_grads`). Re-entrant checkpointing finds no gradient without it. With
    non-reentrant checkpointing, the default of transformers, it only makes backward visit and recompute every layer
    down to the first. Gradients are the same to the last bit either way.

    Safe to call in every step. It does nothing if there is no hook to remove, if the model is not a transformers model,
    or if the model's own code does the checkpointing, which cannot be inspected. It takes under 20 microseconds with 32
    layers, on one CPU core.

    Raises:
        ValueError: checkpointing is on and re-entrant.
    """
    forget_hooks = getattr(model, "disable_input_require_grads", None)
    if not callable(forget_hooks):
        return
    # transformers sets the same flag and function on every module that has the flag, so the first one is enough
    switched: Any = next((module for module in model.modules() if hasattr(module, "gradient_checkpointing")), None)
    if switched is not None and switched.gradient_checkpointing:
        options = getattr(getattr(switched, "_gradient_checkpointing_func", None), "keywords", None)
        if options is None:
            return
        # torch treats None, or a missing argument, as re-entrant
        if options.get("use_reentrant") is not False:
            raise ValueError(
                "gradient checkpointing is re-entrant, which needs a gradient at the embedding that does not train: "
                'call model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
            )
    forget_hooks()
    embedding = declared_module(model, "get_input_embeddings")
    if embedding is not None:
        # enabling twice, or on a part of the model, leaves a hook to which the model no longer holds the handle
        for key, hook in list(embedding._forward_hooks.items()):
            if getattr(hook, "__name__", "") == "make_inputs_require_grads":
                del embedding._forward_hooks[key]


def checkpointing_is_reentrant(model: nn.Module) -> bool:
    """Whether a transformers model checkpoints in the way that cuts backward off behind a frozen embedding.

    transformers passes `use_reentrant=False` by default; torch itself is re-entrant if the argument is missing. A
    model's own checkpointing cannot be inspected and counts as not re-entrant.
    """
    functions = [
        m._gradient_checkpointing_func
        for m in model.modules()
        if getattr(m, "gradient_checkpointing", False) and hasattr(m, "_gradient_checkpointing_func")
    ]
    options = [getattr(function, "keywords", None) for function in functions]
    return any(o is not None and o.get("use_reentrant") is not False for o in options)


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Checkpoint a Hugging Face model's decoder layers; leave other models, and those already checkpointed, alone."""
    can: bool = getattr(model, "supports_gradient_checkpointing", False) and model.training
    if not can or getattr(model, "is_gradient_checkpointing", False):
        yield
        return
    config: Any = getattr(model, "config", None)
    caches = getattr(config, "use_cache", None)
    if caches:
        # a key-value cache is useless in training, and transformers would warn about it for every checkpointed layer
        config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    stop_at_lowest_layer(model)
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()  # type: ignore[operator]
        if caches:
            config.use_cache = caches
