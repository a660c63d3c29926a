"""Finds the decoder layers of a causal language model from the module tree alone.

There is no table of class names: the decoder stack is the one `nn.ModuleList` of similar modules with two or more
matrices each. Parameters outside it form three groups: the embedding (and everything that is in neither of the other
two), the final norm, and the language-model head.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import nn

OUTSIDE = ("embedding", "final_norm", "head")


class LayersError(ValueError):
    """The decoder layers are not found, or cannot be trained one by one; the message says what to pass as `layers`."""

    def __init__(self, reason: str, mend: str) -> None:
        super().__init__(f"{reason}: {mend}")
        self.reason = reason


@dataclass(frozen=True)
class LayerMap:
    """Decoder layers of a model and the parameters outside them.

    Every parameter of the model is in exactly one layer or one outside group. A head tied to the embedding shares its
    tensor, which is listed once, under `embedding`; `head` is then empty or holds the head's own bias.
    """

    layers: tuple[nn.Module, ...]
    """Decoder layers, bottom first."""
    name: str
    """Dotted name of the module list; empty if the caller passed the layers."""
    outside: dict[str, list[nn.Parameter]]
    """Parameters outside the stack, under `embedding`, `final_norm` and `head`."""

    def layer_parameters(self) -> list[list[nn.Parameter]]:
        """Parameters of each decoder layer, in module order."""
        return [list(layer.parameters()) for layer in self.layers]


def find_layers(model: nn.Module, *, layers: str | Sequence[nn.Module] | None = None) -> LayerMap:
    """Find the decoder layers of `model` and group the parameters outside them.

    The stack is the outermost `nn.ModuleList` whose children share a base class more specific than `nn.Module` and hold
    two or more matrices each; if no list has such children, a list of smaller modules is accepted. Of a multimodal
    model's, those of its text count (`text_decoder`).

    The first of these rules that applies decides the group of a parameter outside the stack:

    - `embedding`: it belongs to `model.get_input_embeddings()`.
    - `head`: it belongs to `model.get_output_embeddings()`.
    - `final_norm`: it belongs to a norm (a module with parameters, none of more than one dimension) that is applied to
      the stack's output. Such a norm is a sibling of the stack, or of a module that contains it, and the source of the
      parent's `forward` first mentions it after the stack. If that source does not name the stack (the parent is an
      `nn.ModuleDict`) or is not available, it is a sibling registered after the stack. The innermost level with such a
      norm counts.
    - `embedding`: everything else, such as position embeddings, a norm of the embedding, projections to and from the
      stack's width, and a head that the model does not return from `get_output_embeddings`.

    The rule for the norm reads `forward` from top to bottom, so it misses a norm that `forward` mentions before the
    stack but applies after it, or applies through another method. For 144 causal language models of transformers 5.17
    at their default configurations, it finds exactly the norms that run after the last layer, except norms inside a
    head.

    Args:
        model: a causal language model, or any module if `layers` is given.
        layers: the layers, bottom first, if they cannot be found or others are wanted; or the attribute path of their
            list, such as `"model.language_model.layers"`. A path may begin anywhere in the tree if only one list ends
            with it, so that it also holds for a model that a wrapper (PEFT) contains.

    Raises:
        LayersError: no stack, or more than one candidate (the message lists them and says to pass `layers`); a layer
            without parameters; a parameter that two layers share.
        ValueError: a passed layer that is not part of the model; a path that leads to no list of modules, or to
            several.
    """
    if isinstance(layers, str):
        name, stack = _list_at(model, layers)
        found = tuple(stack)
    elif layers is not None:
        if not layers:
            raise ValueError("layers: the given list is empty")
        inside = {id(module) for module in model.modules()}
        for index, layer in enumerate(layers):
            if id(layer) not in inside:
                raise ValueError(f"layers: number {index} ({type(layer).__name__}) is no submodule of the model")
        name, found = "", tuple(layers)
    else:
        name, stack = _decoder_stack(model)
        found = tuple(stack)
    _check_own_parameters(found)
    return LayerMap(found, name, _outside(model, found))


def declared_module(model: nn.Module, getter: str) -> nn.Module | None:
    """Module that the model's method `getter` returns; None if it has no such method or module."""
    get = getattr(model, getter, None)
    try:
        module = get() if callable(get) else None
    except NotImplementedError:
        # transformers raises it for a model that does not declare its embedding
        return None
    return module if isinstance(module, nn.Module) else None


def text_decoder(model: nn.Module) -> nn.Module | None:
    """The part of a multimodal model of transformers that its text goes through; None of any other model."""
    config = getattr(model, "config", None)
    text_config = getattr(config, "get_text_config", None)
    if text_config is None or text_config() is config:
        return None
    decoder = declared_module(model, "get_decoder")
    return None if decoder is model else decoder


def set_trainable(parameters: Iterable[nn.Parameter], trainable: bool) -> None:
    """Set `requires_grad`; a parameter that is frozen also loses its gradient."""
    for parameter in parameters:
        parameter.requires_grad_(trainable)
        if not trainable:
            parameter.grad = None


def _list_at(model: nn.Module, path: str) -> tuple[str, Iterable[nn.Module]]:
    """Name and modules of the list at an attribute path."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m)}
    ends = [path] if path in lists else [name for name in lists if name.endswith(f".{path}")]
    if len(ends) == 1:
        return ends[0], lists[ends[0]]
    if ends:
        raise ValueError(f"layers={path!r} leads to {' and to '.join(ends)}: give more of the path")
    near = difflib.get_close_matches(path, lists, n=3, cutoff=0.0) or ["none"]
    raise ValueError(f"layers={path!r} leads to no list of modules in this model; lists that it has: {', '.join(near)}")


def _decoder_stack(model: nn.Module) -> tuple[str, nn.ModuleList]:
    candidates: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        # a list inside a candidate's child (experts of a mixture, for example) is part of a layer, not a stack
        if (
            isinstance(module, nn.ModuleList)
            and not any(name.startswith(f"{outer}.") for outer in candidates)
            and any(True for _ in module.parameters())
            and _are_alike(module)
        ):
            candidates[name] = module
    # lists of single projections or embeddings (one per codebook, for example) may accompany a stack but are not one
    candidates = {name: m for name, m in candidates.items() if any(map(_is_deep, m))} or candidates
    text = {id(module) for module in (text_decoder(model) or model).modules()}
    candidates = {name: m for name, m in candidates.items() if id(m) in text} or candidates
    if not candidates:
        raise LayersError(
            "no stack of decoder layers (an nn.ModuleList of equal modules) in this model", "pass layers=[...]"
        )
    if len(candidates) > 1:
        listed = ", ".join(
            f"{name} ({len(m)} x {type(m[0]).__name__}, {sum(p.numel() for p in m.parameters()):,} parameters)"
            for name, m in candidates.items()
        )
        raise LayersError(f"more than one stack could be the decoder ({listed})", "pass layers='<name>'")
    return next(iter(candidates.items()))


def _are_alike(modules: nn.ModuleList) -> bool:
    """Whether all share a class or base class more specific than `nn.Module` (hybrid models)."""
    shared = set.intersection(*(set(type(module).__mro__) for module in modules))
    return bool(shared - set(nn.Module.__mro__))


def _is_deep(module: nn.Module) -> bool:
    return sum(p.dim() > 1 for p in module.parameters()) > 1


def _check_own_parameters(layers: Sequence[nn.Module]) -> None:
    owner: dict[int, int] = {}
    for index, layer in enumerate(layers):
        named = list(layer.named_parameters())
        if not named:
            raise LayersError(
                f"layer {index} ({type(layer).__name__}) has no parameters, so there is nothing to train when it is "
                "drawn",
                "pass layers=[...] without it",
            )
        for name, parameter in named:
            first = owner.setdefault(id(parameter), index)
            if first != index:
                raise LayersError(
                    f"layers {first} and {index} share the parameter {name}, so that freezing one would freeze the "
                    "other",
                    "pass layers=[...] that share none",
                )


def _outside(model: nn.Module, layers: Sequence[nn.Module]) -> dict[str, list[nn.Parameter]]:
    placed = {id(p) for layer in layers for p in layer.parameters()}
    embedding = _parameters_of(declared_module(model, "get_input_embeddings"))
    head = _parameters_of(declared_module(model, "get_output_embeddings"))
    norm = _final_norm(model, layers)
    groups: dict[str, list[nn.Parameter]] = {key: [] for key in OUTSIDE}
    for parameter in model.parameters():
        key = id(parameter)
        if key in placed:
            continue
        if key in head - embedding:
            groups["head"].append(parameter)
        elif key in norm - embedding:
            groups["final_norm"].append(parameter)
        else:
            groups["embedding"].append(parameter)
    return groups


def _parameters_of(module: nn.Module | None) -> set[int]:
    return set() if module is None else {id(p) for p in module.parameters()}


def _final_norm(model: nn.Module, layers: Sequence[nn.Module]) -> set[int]:
    """Ids of the parameters of the norm of the stack's output; empty where there is none."""
    names = {id(module): name for name, module in model.named_modules()}
    paths = [names[id(layer)].split(".") for layer in layers]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*(path[:-1] for path in paths), strict=False))
    for level in range(len(list(shared)), -1, -1):
        parent = model.get_submodule(".".join(paths[0][:level]))
        after = _used_after(parent, {path[level] for path in paths})
        norms = [child for name, child in parent.named_children() if name in after and _is_norm(child)]
        if norms:
            return {id(p) for norm in norms for p in norm.parameters()}
    return set()


def _is_norm(module: nn.Module) -> bool:
    dimensions = [p.dim() for p in module.parameters()]
    return bool(dimensions) and max(dimensions) <= 1


def _used_after(parent: nn.Module, stack: set[str]) -> set[str]:
    """Names that `parent` uses only after its children `stack`."""
    order = list(dict.fromkeys(_reached(type(parent).forward)))
    if not stack <= set(order):
        order = [name for name, _ in parent.named_children()]
    last = max((order.index(name) for name in stack if name in order), default=len(order))
    return set(order[last + 1 :])


def _reached(forward: Callable[..., Any]) -> list[str]:
    """Attributes of `self` in the order in which `forward` uses them; none if its source is not available."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(forward))))
    except (OSError, TypeError, SyntaxError):
        return []
    order: list[str] = []

    def visit(node: ast.AST) -> None:
        # the arguments of a call are evaluated before the call
        children = (*node.args, *node.keywords, node.func) if isinstance(node, ast.Call) else ast.iter_child_nodes(node)
        for child in children:
            visit(child)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            order.append(node.attr)

    visit(tree)
    return order
