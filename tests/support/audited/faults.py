"""Broken scripts: three bugs of public LISA ports, and others."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from grass_tiny import batch, llama
from harness.audit import Audit
from torch import nn

from audited.common import BROKEN, DRAGGED, FORGOTTEN, adamw, audited, broken, lisa, matrices_and_rest, switch


@broken(FORGOTTEN)
def built_from_frozen_parameters(_: Path, *, two: bool = False) -> Audit:
    model = llama()
    switch(model, [0, 1])
    inner, rest = ([p for p in group if p.requires_grad] for group in matrices_and_rest(model))
    optimizers = [torch.optim.Muon(inner, lr=1e-2), adamw(rest)] if two else [adamw([*inner, *rest])]
    return audited(model, optimizers, lambda: lisa(model, *optimizers))


@broken(FORGOTTEN)
def two_optimizers_built_from_frozen_parameters(path: Path) -> Audit:
    return built_from_frozen_parameters(path, two=True)


@broken("the optimizer holds nothing that is switched", verdict="LOOK")
def built_while_every_layer_was_frozen(_: Path) -> Audit:
    model = llama()
    switch(model, [])
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    return audited(model, optimizer, lambda: lisa(model, optimizer))


@broken(DRAGGED)
def zeros_instead_of_none(_: Path, *, clips: bool = False, given: str = "all") -> Audit:
    model = llama()
    inner, rest = matrices_and_rest(model)
    optimizers = [adamw([*inner, *rest])] if given == "all" else [adamw(inner), adamw(rest)]

    def clip(step: int) -> None:
        if clips:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    def run() -> None:
        lisa(model, *optimizers, set_to_none=False, forget=False, between=clip)

    return audited(model, optimizers if given != "first" else optimizers[0], run)


BROKEN["zeros_instead_of_none_and_clipping"] = partial(zeros_instead_of_none, clips=True), DRAGGED
BROKEN["zeros_instead_of_none_in_two_optimizers"] = partial(zeros_instead_of_none, given="both"), DRAGGED
BROKEN["zeros_instead_of_none_in_one_of_two"] = partial(zeros_instead_of_none, given="first"), DRAGGED


@broken(DRAGGED)
def old_gradients_are_never_dropped(_: Path) -> Audit:
    """Layers fall asleep with the gradient of their last step, which goes on training them."""
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        for step in range(8):
            if step % 2 == 0:
                switch(model, [step // 2 % 4])
            for p in model.parameters():
                if p.requires_grad:
                    p.grad = None
            model(**batch(step)).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

    return audited(model, optimizer, run)


@broken(DRAGGED)
def zeros_instead_of_none_and_an_average(_: Path) -> Audit:
    """Weights that the script writes must not hide what the optimizer moves."""
    model = llama()
    optimizer = adamw(model.parameters())

    def shrink(step: int) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.data.mul_(0.999)

    def run() -> None:
        lisa(model, optimizer, set_to_none=False, forget=False, between=shrink)

    return audited(model, optimizer, run)


@broken("never had a gradient")
def backward_is_cut_off(_: Path) -> Audit:
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.disable_input_require_grads()
    model.train()
    model.model.embed_tokens.requires_grad_(False)
    optimizer = adamw(model.parameters())
    return audited(model, optimizer, lambda: lisa(model, optimizer))


@broken("took no step")
def no_step_is_taken(_: Path) -> Audit:
    model = llama()
    return audited(model, adamw(model.parameters()), lambda: model(**batch(0)).loss.backward())


@broken("does not reach every parameter group", verdict="LOOK")
def a_group_that_the_schedule_forgets(_: Path, *, late: bool = False) -> Audit:
    model = llama()
    groups = [{"params": list(model.model.parameters())}, {"params": list(model.lm_head.parameters())}]
    optimizer = adamw(groups[:1] if late else groups)

    def decay(step: int) -> None:
        if late and step == 2:
            optimizer.add_param_group(groups[1])
        optimizer.param_groups[0]["lr"] *= 0.9

    return audited(model, optimizer, lambda: lisa(model, optimizer, between=decay))


@broken("does not reach every parameter group", verdict="LOOK")
def a_late_group_that_the_schedule_forgets(path: Path) -> Audit:
    return a_group_that_the_schedule_forgets(path, late=True)
