"""What the scripts share: the list that each enters, the loop that most of them run, and the audit around it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from grass_tiny import batch
from harness.audit import Audit
from torch import nn

Script = Callable[[Path], Audit]
SOUND: dict[str, Script] = {}
"""The audit must call none of these BROKEN."""
BROKEN: dict[str, tuple[Script, str]] = {}
"""The audit must call each of these BROKEN, in these words."""
DOUBTFUL: dict[str, tuple[Script, str]] = {}
"""Broken scripts that look like sound ones: the audit must say LOOK of each, in these words."""
FORGOTTEN, DRAGGED = "got gradients and never moved", "moved while switched off"


def sound(script: Script) -> Script:
    """Enter a script, which gets a folder of its own, among the sound ones."""
    SOUND[script.__name__] = script
    return script


def broken(words: str, *, verdict: Literal["BROKEN", "LOOK"] = "BROKEN") -> Callable[[Script], Script]:
    """Enter a script among the broken ones, with a part of the verdict on it."""

    def enter(script: Script) -> Script:
        (BROKEN if verdict == "BROKEN" else DOUBTFUL)[script.__name__] = script, words
        return script

    return enter


def adamw(parameters: Iterable[Any], lr: float = 1e-2, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, **options)


def switch(model: Any, active: Sequence[int]) -> None:
    for number, layer in enumerate(model.model.layers):
        layer.requires_grad_(number in active)


def lisa(
    model: Any,
    *optimizers: torch.optim.Optimizer,
    steps: int = 12,
    set_to_none: bool = True,
    between: Callable[[int], None] = lambda step: None,
    forget: bool = True,
) -> None:
    """Two of four layers train, drawn anew every third step; `between` is called after each step."""
    draws = random.Random(3)
    for step in range(steps):
        if step % 3 == 0:
            switch(model, draws.sample(range(4), 2))
            for optimizer in optimizers:
                for p in model.model.layers.parameters() if forget else ():
                    optimizer.state.pop(p, None)
        model(**batch(step)).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)
        between(step)


def audited(model: Any, given: Any, run: Callable[[], Any], **options: Any) -> Audit:
    with Audit(model, given, quiet=True, **options) as audit:
        run()
    return audit


def matrices_and_rest(model: Any) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    inner = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    return inner, [p for p in model.parameters() if not any(p is q for q in inner)]
