"""Where a causal language model keeps its decoder layers, found from the module tree alone.

No table of class names: the decoder stack is the one `nn.ModuleList` whose children hold most of the model's
parameters. What lies outside it is split in three groups: the embedding (and anything else before the stack), the
final norm, and the language-model head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

OUTSIDE = ("embedding", "final_norm", "head")


@dataclass(frozen=True)
class LayerMap:
    """Decoder layers of a model and the parameters outside them.

    Every parameter of the model is in exactly one layer or one outside group. A head tied to the embedding is one
    tensor; it is listed once, under `embedding`, and `head` is empty.
    """

    layers: tuple[nn.Module, ...]
    """Decoder layers, bottom first."""
    name: str
    """Dotted name of the module list; empty where the layers were given by hand."""
    outside: dict[str, list[nn.Parameter]]
    """Parameters outside the stack, under `embedding`, `final_norm` and `head`."""

    def layer_parameters(self) -> list[list[nn.Parameter]]:
        """Parameters of each decoder layer, in module order."""
        return [list(layer.parameters()) for layer in self.layers]


def find_layers(model: nn.Module, *, layers: Sequence[nn.Module] | None = None) -> LayerMap:
    """Find the decoder layers of `model`.

    Args:
        model: a causal language model, or any module if `layers` is given.
        layers: the layers, bottom first, where they cannot be found or others are wanted.

    Raises:
        ValueError: no stack, or more than one candidate; the message lists them and says to pass `layers`.
    """
    if layers is not None:
        if not layers:
            raise ValueError("layers: the given list is empty")
        return LayerMap(tuple(layers), "", _outside(model, layers))
    name, stack = _largest_stack(model)
    return LayerMap(tuple(stack), name, _outside(model, list(stack)))


def _largest_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    total = sum(p.numel() for p in model.parameters())
    candidates: list[tuple[str, nn.ModuleList, int]] = []
    for name, module in model.named_modules():
        # a list inside a candidate's child (the experts of a mixture, say) is part of a layer, not a stack
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer, _, _ in candidates):
            size = sum(p.numel() for p in module.parameters())
            if size and len({type(child) for child in module}) == 1:
                candidates.append((name, module, size))
    listed = ", ".join(
        f"{name} ({len(m)} x {type(m[0]).__name__}, {size:,} parameters)" for name, m, size in candidates
    )
    if not candidates:
        raise ValueError(
            "no stack of decoder layers (an nn.ModuleList of equal modules) in this model: pass layers=[...]"
        )
    candidates.sort(key=lambda candidate: -candidate[2])
    if len(candidates) > 1 and candidates[1][2] > 0.1 * total:
        raise ValueError(f"more than one stack could be the decoder ({listed}): pass layers=list(model.<name>)")
    return candidates[0][0], candidates[0][1]


def _outside(model: nn.Module, layers: Sequence[nn.Module]) -> dict[str, list[nn.Parameter]]:
    inside = {id(p) for layer in layers for p in layer.parameters()}
    embedding = _parameters_of(model, "get_input_embeddings")
    head = _parameters_of(model, "get_output_embeddings")
    groups: dict[str, list[nn.Parameter]] = {key: [] for key in OUTSIDE}
    seen: set[int] = set()
    passed_stack = False
    for _, parameter in model.named_parameters(remove_duplicate=True):
        if id(parameter) in inside:
            passed_stack = True
            continue
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        if id(parameter) in embedding:
            groups["embedding"].append(parameter)
        elif id(parameter) in head:
            groups["head"].append(parameter)
        else:
            # what comes before the stack in the module tree (position embeddings) goes with the embedding,
            # what comes after it normalises the stack's output
            groups["final_norm" if passed_stack else "embedding"].append(parameter)
    return groups


def _parameters_of(model: nn.Module, getter: str) -> set[int]:
    get = getattr(model, getter, None)
    module = get() if callable(get) else None
    return {id(p) for p in module.parameters()} if isinstance(module, nn.Module) else set()


def set_trainable(parameters: Iterable[nn.Parameter], trainable: bool) -> None:
    """Switch gradients; a parameter that is switched off also loses the gradient it has."""
    for parameter in parameters:
        parameter.requires_grad_(trainable)
        if not trainable:
            parameter.grad = None
