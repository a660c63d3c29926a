"""`requires_grad` flags: those that the user set, those that a `Grass` set, and what changed behind its back.

What the user froze before `Grass(model)` stays frozen. A `Grass` freezes its sleeping layers itself, so flags alone do
not tell whose they are: it notes in the model which parameters are its own. The note is part of the module, so that
copies of a model and pickled ones have it too, and another `Grass` over the same model reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

NOTE = "_requires_grad_by_grass"
"""Attribute of a model: by parameter name, the flag that the last `Grass` over it set; frozen by the user: absent."""


@dataclass(frozen=True)
class _Look:
    parameter: nn.Parameter
    shape: torch.Size
    dtype: torch.dtype


class Flags:
    """Parameters of a model that one `Grass` may train and freeze: all but those that the user froze before.

    A parameter that an earlier `Grass` had put to sleep is not frozen by the user. Freezing it once more leaves no
    trace: call `model.requires_grad_(True)` first, and freeze then. As soon as any parameter that slept is trainable
    again, all flags count as the user's.

    Args:
        model: as the user hands it over.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        named = dict(model.named_parameters())
        earlier: dict[str, bool] = dict(vars(model).get(NOTE, {}))
        if any(named[name].requires_grad for name, awake in earlier.items() if not awake and name in named):
            earlier = {}
        self._own = {name: p for name, p in named.items() if p.requires_grad or not earlier.get(name, True)}
        self._ids = {id(p) for p in self._own.values()}
        self._looks = {name: _Look(p, p.shape, p.dtype) for name, p in named.items()}
        self._noted: dict[str, bool] = {}
        self.frozen_entries = sum(p.numel() for name, p in named.items() if name not in self._own)
        """Entries of all parameters that the user froze."""

    @property
    def own(self) -> dict[str, nn.Parameter]:
        """Parameters that are not frozen by the user, by name."""
        return self._own

    def own_of(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """Those of `parameters` that are not frozen by the user."""
        return [p for p in parameters if id(p) in self._ids]

    def layers(self, stack: Sequence[Sequence[nn.Parameter]]) -> list[list[nn.Parameter]]:
        """Own parameters of each decoder layer; empty where the user froze all of it.

        Raises:
            ValueError: no layer has any.
        """
        own = [self.own_of(parameters) for parameters in stack]
        if not any(own):
            raise ValueError(
                "every decoder layer is frozen (requires_grad is False), so there is nothing to draw: call "
                "requires_grad_(True) on what shall train, or on the whole model, before Grass"
            )
        return own

    def note(self) -> None:
        """Remember the flags as they are now; call it whenever this `Grass` has set any."""
        self._noted = {name: p.requires_grad for name, p in self._own.items()}
        vars(self._model)[NOTE] = self._noted

    def check(self) -> None:
        """Raise if the model is not as it was when `Grass` was built, up to the flags that it set itself.

        Raises:
            RuntimeError: a parameter that is new, gone, replaced, cast, resized, frozen or made trainable.
        """
        now = dict(self._model.named_parameters())
        for name in {**self._looks, **now}:
            if change := self._change(name, now.get(name)):
                raise RuntimeError(
                    f"the parameter {name} {change} after Grass was built: prepare the model first (load, resize, cast "
                    "and freeze it), then build Grass"
                )

    def _change(self, name: str, now: nn.Parameter | None) -> str | None:
        before = self._looks.get(name)
        if now is None:
            return "was removed"
        if before is None:
            return "was added" if now.requires_grad else None
        if now is not before.parameter:
            return "was replaced by another tensor"
        if now.shape != before.shape:
            return f"went from shape {tuple(before.shape)} to {tuple(now.shape)}"
        if now.dtype != before.dtype:
            return f"was cast from {before.dtype} to {now.dtype}"
        if now.requires_grad != self._noted.get(name, False):
            return "was made trainable" if now.requires_grad else "was frozen"
        return None
