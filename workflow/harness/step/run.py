"""One optimizer step of an attached method: the same code in training, forecasts and measurements.

The caller owns clock, meters and batches. Nothing here measures, and nothing here depends on which method it is.
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
"""Parts of a step. `begin` is where a method freezes and draws layers, unless it does so at the end of a step."""


class StepContext:
    """Supplies a step with batches and loss, and is called at each of its parts; methods are in order of the calls."""

    def part(self, part: Part) -> AbstractContextManager[None]:
        """A context manager that is entered around each part of the step."""
        return nullcontext()

    def begun(self) -> None:
        """Called when the method has begun the step: it is known what will train, and nothing is computed yet."""

    def micro_batches(self) -> Sequence[Batch]:
        """The step's micro-batches; called once, after `begun`."""
        raise NotImplementedError

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Loss of one micro-batch (scalar), scaled so that the losses of all micro-batches sum to the step's loss."""
        raise NotImplementedError

    def after_backward(self, loss: Tensor) -> None:
        """Called after each micro-batch's backward, with its detached loss."""

    def before_update(self) -> None:
        """Called when all gradients of the step have been computed."""


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
        # free this micro-batch's graph before the next forward pass
        del loss
    context.before_update()

    def replay() -> Iterator[Tensor]:
        return (context.loss(module, batch) for batch in batches)

    with context.part("update"):
        return method.end_step(replay)
