"""Which parameters a step's gradients were made for, and where a gradient that nobody wants comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass
class Looked:
    """Names of parameters, as they were when an optimizer was about to step."""

    on: set[str] = field(default_factory=set)
    graded: set[str] = field(default_factory=set)
    left_over: set[str] = field(default_factory=set)
    """Off, with a gradient that was made while they were on."""
    by_hand: set[str] = field(default_factory=set)
    """Off, with a gradient that no backward pass made."""


class Gradients:
    """Listens to forward and backward passes.

    A script may switch layers at any moment, between backward and the optimizer's step too. What counts is what
    required gradients when the forward pass began; a gradient that an update in backward has used and freed counts too.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = parameters
        self._hooks: dict[str, Any] = {}
        self._arrived: set[str] = set()
        """Names whose gradient a backward pass computed since it was last used."""
        self._flags: frozenset[str] | None = None
        """Names that required gradients when the last forward pass with gradients began."""
        self._made: dict[str, StorageWeakRef] = {}
        """Storage of the gradient that each parameter had when it was last on."""

    def listen(self) -> None:
        """Hook every parameter that requires gradients and is not hooked yet; torch hooks no others."""
        for name, p in self._parameters.items():
            if p.requires_grad and name not in self._hooks:
                # the hook must return None, as `add` does: anything else would replace the gradient
                self._hooks[name] = p.register_hook(lambda _, name=name: self._arrived.add(name))

    def stop_listening(self) -> None:
        """Remove all hooks."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    def forward_begins(self) -> None:
        """Remember what is on; called when the model's forward pass begins."""
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.listen()
            self._flags = frozenset(name for name, p in self._parameters.items() if p.requires_grad)

    def look(self, names: Iterable[str]) -> Looked:
        """What these parameters' gradients are now."""
        looked = Looked()
        for name in names:
            p = self._parameters[name]
            came = name in self._arrived
            flagged = p.requires_grad if self._flags is None else name in self._flags
            # a gradient that no update has used yet is wanted, whatever the flag says by now
            if flagged or (came and _is_there(p.grad)):
                looked.on.add(name)
                if came or p.grad is not None:
                    looked.graded.add(name)
                if p.grad is not None:
                    self._made[name] = StorageWeakRef(_storage(p.grad))
            elif p.grad is not None:
                made = self._made.get(name)
                # clipping and zeroing in place leave the storage as it was; a gradient set by hand brings its own
                left = made is not None and made.cdata == StorageWeakRef(_storage(p.grad)).cdata
                (looked.left_over if left else looked.by_hand).add(name)
        return looked

    def used(self, names: Iterable[str]) -> None:
        """An update has used the gradients of these parameters: what is there of them from now on is left over."""
        self._arrived.difference_update(names)


def usable(gradient: Tensor | None) -> bool:
    """Whether it is there, not all zero (Adam does not move then) and finite (a loss scaler skips the step if not)."""
    return gradient is not None and 0 < _largest(gradient) < float("inf")


def _is_there(gradient: Tensor | None) -> bool:
    """Whether it is neither missing nor set to zero."""
    return gradient is not None and _largest(gradient) != 0


def _largest(gradient: Tensor) -> float:
    values = gradient.coalesce().values() if gradient.layout is torch.sparse_coo else gradient
    return float(torch.linalg.vector_norm(values.detach(), float("inf")))


def _storage(gradient: Tensor) -> torch.UntypedStorage:
    return (gradient._values() if gradient.layout is torch.sparse_coo else gradient).untyped_storage()
