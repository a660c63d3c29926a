"""Sound scripts with schedules, some of which leave a group as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from grass_tiny import llama
from harness.audit import Audit

from audited.common import adamw, audited, lisa, matrices_and_rest, sound


def scheduled(_: Path, factors: Any, *, frozen_by_rate: bool = False) -> Audit:
    model = llama()
    groups = [{"params": model.model.parameters()}, {"params": model.lm_head.parameters()}]
    optimizer = adamw(groups)
    if frozen_by_rate:
        optimizer.param_groups[1]["lr"] = 0.0
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors)
    return audited(model, optimizer, lambda: lisa(model, optimizer, between=lambda _: schedule.step()))


@sound
def every_rate_is_zero(path: Path) -> Audit:
    return scheduled(path, lambda step: 0.0)


@sound
def a_group_is_frozen_by_rate_zero(path: Path) -> Audit:
    return scheduled(path, lambda step: 0.9**step, frozen_by_rate=True)


@sound
def a_schedule_leaves_one_group_constant(path: Path) -> Audit:
    return scheduled(path, [lambda step: 0.9**step, lambda step: 1.0])


@sound
def a_home_made_schedule_for_groups_of_their_own_rates(_: Path) -> Audit:
    model = llama()
    optimizer = adamw([{"params": model.model.parameters()}, {"params": model.lm_head.parameters(), "lr": 1e-4}])

    def decay(step: int) -> None:
        optimizer.param_groups[0]["lr"] *= 0.9

    return audited(model, optimizer, lambda: lisa(model, optimizer, between=decay))


@sound
def a_home_made_schedule_keeps_one_of_two_groups(_: Path) -> Audit:
    model = llama()
    optimizer = adamw([{"params": model.model.parameters()}, {"params": model.lm_head.parameters()}])

    def decay(step: int) -> None:
        optimizer.param_groups[0]["lr"] *= 0.9

    return audited(model, optimizer, lambda: lisa(model, optimizer, between=decay))


@sound
def two_optimizers_one_scheduled(_: Path) -> Audit:
    model = llama()
    inner, rest = matrices_and_rest(model)
    both = [torch.optim.Muon(inner, lr=1e-2), adamw(rest)]
    schedule = torch.optim.lr_scheduler.LambdaLR(both[0], lambda step: 0.9**step)
    return audited(model, both, lambda: lisa(model, *both, between=lambda _: schedule.step()))


@sound
def a_plateau_schedule_with_a_floor_for_one_group(_: Path) -> Audit:
    model = llama()
    optimizer = adamw([{"params": model.model.parameters()}, {"params": model.lm_head.parameters()}])
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1, min_lr=[0.0, 1e-2])
    return audited(model, optimizer, lambda: lisa(model, optimizer, between=lambda _: schedule.step(1.0)))
