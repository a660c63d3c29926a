"""Attaches a method, given by name, to a model that is then ready to train: the one place where this happens."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from baselines import find_method
from baselines.method import Expectation, Method, ModelFacts, Recipe, precision_conflict
from grass.distributed import ranks
from harness.errors import first_line
from harness.step.facts import facts_of
from harness.step.outcomes import CannotRunError


@dataclass(frozen=True)
class Attached:
    """A model with a method on it."""

    method: Method
    module: nn.Module
    """The module that trains: the model, perhaps wrapped."""
    facts: ModelFacts
    """Facts of the model, taken before the method touched it."""
    promise: Expectation


def method_class(module: str) -> type[Method]:
    """The method in `baselines.<module>`; every run and every check finds its method through here.

    Raises:
        LookupError: no such file, or not exactly one method in it.
    """
    return find_method(module)


def new_method(module: str, options: Mapping[str, Any], *, recipe: Recipe, lr: float | None, seed: int) -> Method:
    """A method that is not attached yet.

    Args:
        module: file under `baselines/`, without its ending.
        options: of the method, as in its config entry; options left out take their defaults.
        recipe: of the run.
        lr: peak learning rate; None for a method that takes no step.
        seed: for the method's own draws.

    Raises:
        CannotRunError: a package that the method needs is missing, or it cannot train under several processes.
    """
    found = method_class(module)
    if ranks() > 1 and not found.RANKS:
        raise CannotRunError(f"{module} cannot train under {ranks()} processes: give its entry `gpus: 1`")
    missing = [package for package in found.REQUIRES if importlib.util.find_spec(package) is None]
    if missing:
        raise CannotRunError(f"needs the package {', '.join(missing)}")
    return found(found.Config.model_validate(options, strict=False), recipe=recipe, lr=lr or 0.0, seed=seed)


def attach(method: Method, model: nn.Module) -> Attached:
    """Attach `method` to `model`, in training mode, with activation checkpointing if the recipe asks for it.

    Args:
        method: made with the recipe of the run.
        model: a causal language model of transformers on its device, every parameter requiring a gradient.

    Raises:
        CannotRunError: the method, or the library that it is built on, refuses; the message is the reason.
    """
    with refusals():
        switch_on_checkpointing(model, method.recipe.activation_checkpointing)
        facts = facts_of(model)
        reason = precision_conflict(type(method), method.recipe) or method.skip(facts)
        if reason is not None:
            raise CannotRunError(reason)
        module = method.attach(model).train()
    return Attached(method, module, facts, method.expect(facts))


@contextmanager
def refusals() -> Iterator[None]:
    """What says no to a model, by an exception of one of the kinds that libraries refuse by, is a reason to skip.

    Exceptions of other kinds are faults of the program, and pass.

    Raises:
        CannotRunError: with the first line of the refusal.
    """
    try:
        yield
    except (ValueError, NotImplementedError, ImportError) as error:
        raise CannotRunError(first_line(error)) from error


def switch_on_checkpointing(model: Any, asked: bool) -> None:
    """Non-reentrant activation checkpointing of a model of transformers.

    transformers also puts a hook on the embedding, which only the re-entrant kind needs. The hook would force backward
    to visit every layer below the lowest active one, so it is removed again.
    """
    if asked:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()
