"""One optimizer step of an attached method: the same code in training, in a forecast, and where it is measured.

Who runs a step owns clock, meters and batches; nothing here measures, and nothing here asks which method it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal

from torch import Tensor, nn

from baselines.method import StepFacts
from harness.step.attach import Attached

Batch = Mapping[str, Tensor]
Part = Literal["begin", "forward", "backward", "update"]
"""Of a step. In `begin` the method freezes and draws, if it does so before the step and not after the last one."""


def run_step(
    attached: Attached,
    step: int,
    *,
    lr_factor: float,
    micro_batches: Callable[[], Sequence[Batch]],
    loss: Callable[[nn.Module, Batch], Tensor],
    part: Callable[[Part], AbstractContextManager[None]],
    begun: Callable[[], None] = lambda: None,
    after_backward: Callable[[Tensor], None] = lambda loss: None,
    before_update: Callable[[], None] = lambda: None,
) -> StepFacts:
    """Forward and backward over every micro-batch, then one update.

    Args:
        attached: the method on its model.
        step: number of the step, from 0.
        lr_factor: factor of every group's own learning rate.
        micro_batches: makes the step's batches, when the method has begun the step.
        loss: of one micro-batch, divided so that the sum over all is the step's loss (scalar).
        part: brackets each part of the step.
        begun: called when the method has begun the step.
        after_backward: told each micro-batch's loss, detached.
        before_update: called when all gradients are there.
    """
    method, module = attached.method, attached.module
    with part("begin"):
        method.set_lr_factor(lr_factor)
        method.begin_step(step)
    begun()
    batches = micro_batches()
    for number, batch in enumerate(batches, start=1):
        with part("forward"):
            scalar = loss(module, batch)
        with part("backward"):
            method.backward(scalar, last=number == len(batches))
        after_backward(scalar.detach())
        # the next forward pass must not find this one's graph alive
        del scalar
    before_update()

    def replay() -> Iterator[Tensor]:
        return (loss(module, batch) for batch in batches)

    with part("update"):
        return method.end_step(replay)
