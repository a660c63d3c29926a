"""Facts of a model before any method touches it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from baselines.method import ModelFacts
from grass.layers import LayerMap, LayersError, declared_module, find_layers, text_decoder
from harness.step.outcomes import CannotRunError


def layers_of(model: nn.Module) -> LayerMap:
    """The decoder layers of a model and the parameters outside them.

    Raises:
        CannotRunError: they are not found, or cannot be trained one by one. A study takes no `layers`: of the towers of
            a multimodal model, `unreached_as_buffers` leaves the one that text reaches.
    """
    try:
        return find_layers(model)
    except LayersError as error:
        raise CannotRunError(
            f"{error.reason}: studies and forecasts take models whose text goes through one stack of layers; "
            "Grass and Audit take layers= in a script of your own"
        ) from error


def facts_of(model: nn.Module) -> ModelFacts:
    """Count the parameters of a model by decoder layer, embedding, final norm and head; weights may be on `meta`.

    Raises:
        CannotRunError: as `layers_of`.
    """
    found = layers_of(model)
    config: Any = model.config
    head = _size(found.outside["head"])
    return ModelFacts(
        architecture=type(model).__name__,
        layer_parameters=tuple(_size(layer.parameters()) for layer in found.layers),
        embedding_parameters=_size(found.outside["embedding"]),
        head_parameters=head,
        final_norm_parameters=_size(found.outside["final_norm"]),
        hidden_size=config.get_text_config().hidden_size,
        tied_embeddings=head == 0,
        tensor_parameters={name: p.numel() for name, p in model.named_parameters()},
        layer_tensors=tuple(tuple(p.numel() for p in layer.parameters()) for layer in found.layers),
        outside_tensors={key: tuple(p.numel() for p in given) for key, given in found.outside.items()},
    )


def unreached_as_buffers(model: nn.Module, *, as_built: nn.Module) -> nn.Module:
    """Turn parameters that training on text cannot reach into buffers, in place; returns the model.

    A method that sets flags would train them, or promise to train what never gets a gradient. As buffers they are on
    the same device and in the same checkpoint, under the same key, and no method sees them. They are of two kinds:

    - Constants that an architecture freezes itself: tables of sinusoids (RoFormer, Pegasus), the experts' correction
      biases (Ernie 4.5, AFMoE), a patcher of bytes (BLT).
    - The towers of a multimodal model beside its text (Gemma 3's vision): what lies neither in the module that
      `get_decoder` returns nor in the embedding or the head.

    Args:
        model: its own flags do not count: `from_pretrained` makes everything trainable (transformers 5.17).
        as_built: the same architecture as its constructor leaves it, which may be on `meta`, or the model itself.
    """
    unreached = {name for name, p in as_built.named_parameters(remove_duplicate=False) if not p.requires_grad}
    unreached |= _beside_text(model)
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            # packed weights of a quantised model are no constants
            if f"{prefix}.{name}".lstrip(".") in unreached and parameter.is_floating_point():
                del module._parameters[name]
                module.register_buffer(name, parameter.detach())
    return model


def _beside_text(model: nn.Module) -> set[str]:
    """Names of the parameters of a multimodal model that its text does not go through; none of any other model."""
    decoder = text_decoder(model)
    if decoder is None:
        return set()
    text = [decoder, *(declared_module(model, f"get_{side}_embeddings") for side in ("input", "output"))]
    inside = {id(p) for module in text if module is not None for p in module.parameters()}
    return {name for name, p in model.named_parameters(remove_duplicate=False) if id(p) not in inside}


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
