"""Optimizers from outside: wrappers, optimizers inside optimizers, and those that hold a parameter."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

T = TypeVar("T")


def unwrapped(given: Any) -> list[Optimizer]:
    """The optimizers whose steps torch's hooks see, each once.

    Raises:
        ValueError: something is not a torch optimizer, or nothing is given.
    """
    found = [_inner(one) for one in (given if isinstance(given, Iterable) else [given])]
    if not found:
        raise ValueError("optimizer is an empty list: give the optimizers that train the model")
    for one in found:
        if not isinstance(one, Optimizer):
            raise ValueError(f"optimizer is a {type(one).__name__}, not a torch.optim.Optimizer")
    return list({id(one): one for one in found}.values())


def _inner(one: Any) -> Any:
    # accelerate's wrapper is an Optimizer too, but without an optimizer's hooks: it calls the inner one's `step`
    while not hasattr(one, "_optimizer_step_pre_hooks") and hasattr(one, "optimizer"):
        one = one.optimizer
    return one


def family(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and those that it keeps as attributes, alone or in a list or dict, and those that these keep.

    BAdam's, for one, has all its state in an inner one; the layer-wise optimizers of transformers are a stand-in that
    keeps one for each parameter.
    """
    found = {id(optimizer): optimizer}
    for value in vars(optimizer).values():
        kept = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        for inner in kept:
            if isinstance(inner, Optimizer) and id(inner) not in found:
                found |= {id(one): one for one in family(inner)}
    return list(found.values())


def held_by(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """Parameters in these optimizers' groups."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def listed(optimizers: Iterable[Optimizer]) -> str:
    """`Muon and AdamW`, `27 AdamW`: the classes, with their number if above one."""
    counts = Counter(type(optimizer).__name__ for optimizer in optimizers)
    return " and ".join(name if count == 1 else f"{count} {name}" for name, count in counts.items())


def who_waits(parameters: Mapping[str, nn.Parameter], *, besides: Container[int]) -> dict[str, str]:
    """Class of a living optimizer that holds each parameter; parameters that none holds are left out.

    Args:
        parameters: by name; if empty, nothing is searched.
        besides: ids of optimizers that are not meant.
    """
    names = {id(p): name for name, p in parameters.items()}
    found: dict[str, str] = {}
    for one in _living(Optimizer) if names else ():
        if id(one) not in besides and "param_groups" in vars(one):
            found |= {names[id(p)]: type(one).__name__ for p in held_by([one]) if id(p) in names}
    return found


def on_plateau() -> set[int]:
    """Ids of optimizers under a `ReduceLROnPlateau`, the one scheduler of torch that leaves no mark on their groups."""
    return {id(scheduler.optimizer) for scheduler in _living(ReduceLROnPlateau)}


def _living(kind: type[T]) -> Iterator[T]:
    # type(), not isinstance(): isinstance makes the lazy objects of other libraries import large packages
    return (one for one in gc.get_objects() if issubclass(type(one), kind))
