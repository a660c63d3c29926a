"""Sound scripts whose weights are updated in backward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from grass_tiny import batch, llama
from harness.audit import Audit
from torch import nn

from audited.common import adamw, audited, lisa, sound


def update_in_backward(model: Any, *, lr: float = 1e-2) -> dict[nn.Parameter, torch.optim.Optimizer]:
    """An optimizer for each parameter, which steps as soon as its gradient is there."""
    each = {p: adamw([p], lr=lr) for p in model.parameters()}

    def update(p: nn.Parameter) -> None:
        each[p].step()
        each[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(update)
    return each


@sound
def an_optimizer_for_each_parameter(_: Path, *, given: str = "all", lr: float = 1e-2) -> Audit:
    """The recipe of torch's documentation."""
    model = llama()
    each = update_in_backward(model, lr=lr)
    head = each[model.lm_head.weight]
    return audited(model, list(each.values()) if given == "all" else head, lambda: lisa(model))


@sound
def only_one_of_them_given(path: Path) -> Audit:
    return an_optimizer_for_each_parameter(path, given="one")


@sound
def updates_in_backward_at_rate_zero(path: Path) -> Audit:
    return an_optimizer_for_each_parameter(path, lr=0.0)


@sound
def torchs_own_updates_in_backward(_: Path) -> Audit:
    from torch.distributed.optim import _apply_optimizer_in_backward, _get_in_backward_optimizers

    model = llama()
    _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
    return audited(model, _get_in_backward_optimizers(model), lambda: lisa(model))


@sound
def updates_in_backward_by_hand(_: Path, *, lr: float = 0.1) -> Audit:
    """Hooks that write weights, beside an optimizer for the head."""
    model = llama()

    def update(p: nn.Parameter) -> None:
        assert p.grad is not None
        p.data.add_(p.grad, alpha=-lr)
        p.grad = None

    for p in model.model.parameters():
        p.register_post_accumulate_grad_hook(update)
    optimizer = adamw(model.lm_head.parameters())
    return audited(model, optimizer, lambda: lisa(model, optimizer))


@sound
def updates_in_backward_by_hand_at_rate_zero(path: Path) -> Audit:
    return updates_in_backward_by_hand(path, lr=0.0)


@sound
def lomo(_: Path) -> Audit:
    from lomo_optim import Lomo

    model = llama()
    optimizer = Lomo(model, lr=1e-2)

    def run() -> None:
        for step in range(4):
            optimizer.fused_backward(model(**batch(step)).loss, 1e-2)

    return audited(model, optimizer, run)
