"""One optimizer step of an attached method: the same code in training, in a forecast, and where it is measured.

Who runs a step owns clock, meters and batches; nothing here measures, and nothing here asks which method it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

from torch import Tensor, nn

from baselines.method import StepFacts
from harness.step.attach import Attached

Batch = Mapping[str, Tensor]
Part = Literal["begin", "forward", "backward", "update"]
"""Of a step. In `begin` the method freezes and draws, if it does so before the step and not after the last one."""


class StepContext:
    """What one step is given, and who is told of it, in the order in which it happens."""

    def part(self, part: Part) -> AbstractContextManager[None]:
        """Brackets each part of the step."""
        return nullcontext()

    def begun(self) -> None:
        """The method has begun the step: what will train is known, and nothing is computed yet."""

    def micro_batches(self) -> Sequence[Batch]:
        """The step's batches; asked for once, when the step is begun."""
        raise NotImplementedError

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Loss of one micro-batch, divided so that the sum over all is the step's (scalar)."""
        raise NotImplementedError

    def after_backward(self, loss: Tensor) -> None:
        """Backward of a micro-batch is over; its loss, detached."""

    def before_update(self) -> None:
        """All gradients are there that will be."""


def run_step(attached: Attached, step: int, *, lr_factor: float, context: StepContext) -> StepFacts:
    """Forward and backward over every micro-batch, then one update.

    Args:
        attached: the method on its model.
        step: number of the step, from 0.
        lr_factor: factor of every group's own learning rate.
        context: of the step.
    """
    method, module = attached.method, attached.module
    with context.part("begin"):
        method.set_lr_factor(lr_factor)
        method.begin_step(step)
    context.begun()
    batches = context.micro_batches()
    for number, batch in enumerate(batches, start=1):
        with context.part("forward"):
            loss = context.loss(module, batch)
        with context.part("backward"):
            method.backward(loss, last=number == len(batches))
        context.after_backward(loss.detach())
        # the next forward pass must not find this one's graph alive
        del loss
    context.before_update()

    def replay() -> Iterator[Tensor]:
        return (context.loss(module, batch) for batch in batches)

    with context.part("update"):
        return method.end_step(replay)
