"""Facts of a model before any method touches it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from baselines.method import ModelFacts
from grass.layers import find_layers


def facts_of(model: nn.Module) -> ModelFacts:
    """Count the parameters of a model by decoder layer, embedding, final norm and head; weights may be on `meta`."""
    found = find_layers(model)
    config: Any = model.config
    head = _size(found.outside["head"])
    return ModelFacts(
        architecture=type(model).__name__,
        layer_parameters=tuple(_size(layer.parameters()) for layer in found.layers),
        embedding_parameters=_size(found.outside["embedding"]),
        head_parameters=head,
        final_norm_parameters=_size(found.outside["final_norm"]),
        hidden_size=config.hidden_size,
        tied_embeddings=head == 0,
        tensor_parameters={name: p.numel() for name, p in model.named_parameters()},
    )


def _size(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
