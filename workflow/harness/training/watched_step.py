"""The harness's part of an optimizer step in training: batches, loss, logs, and observations of the model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from grass.distributed import ranks
from harness.measuring.clock import StepClock
from harness.measuring.meters import Meters
from harness.step.loss import loss_of
from harness.step.run import Batch, Part, StepContext
from harness.training.loading import Loaded
from harness.training.logs import Log


class WatchedStep(StepContext):
    """The harness's part of step `step`; clock and meters leave observations of the model out.

    Args:
        run: the model in training.
        step: counted from 0.
        period: steps in the method's period, or in the fallback period that the harness watches it by.
        meters: of the run.
        clock: of the run, started.
        log: of the run.
    """

    def __init__(self, run: Loaded, step: int, period: int, *, meters: Meters, clock: StepClock, log: Log) -> None:
        self._run, self._step, self._meters, self._clock, self._log = run, step, meters, clock, log
        self.starts_period, self._ends_period = step % period == 0, (step + 1) % period == 0
        self._part_phases: Callable[[str], AbstractContextManager[None]] = meters.parts(step, period)
        self._total: Tensor | None = torch.zeros((), device=run.method.recipe.device)
        self._targets = 0
        self.batches: list[dict[str, Tensor]] = []
        """The step's micro-batches, on the run's device."""

    def part(self, part: Part) -> AbstractContextManager[None]:
        """Records the part's allocator peaks; a period's last update is `resample` if the method promises a period."""
        if part == "begin":
            return nullcontext()
        draws = part == "update" and self._ends_period and self._run.promise.period_steps is not None
        return self._part_phases("resample" if draws else part)

    def begun(self) -> None:
        """Log what the method believes, and fingerprint the weights at the start of a period."""
        trace = self._run.method.trace()
        self._log.belief(self._step, trace)
        if self.starts_period:
            with self._clock.paused(), self._meters.excluded():
                self._run.watch.start_period(self._step, trace)

    def micro_batches(self) -> list[dict[str, Tensor]]:
        """Micro-batches of the step that this process takes, whose rows depend on seed and step alone."""
        self.batches = self._run.batches.step(self._step)
        self._targets = self._run.batches.label_tokens(self._step)
        return self.batches

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """The micro-batch's share of the step's mean loss per label token, times the number of processes.

        Gradients are averaged over processes: so that the average is the gradient of the mean over all label tokens, it
        is their number in the whole step that each process divides by.
        """
        recipe = self._run.method.recipe
        of_batch = loss_of(chunked=recipe.chunked_loss, autocast=recipe.autocast)
        return of_batch(module, batch) / (self._targets / ranks())

    def after_backward(self, loss: Tensor) -> None:
        """Add up the step's loss."""
        assert self._total is not None
        self._total += loss

    def before_update(self) -> None:
        """At the start of a period, record which gradients exist."""
        if self.starts_period:
            with self._clock.paused():
                self._run.watch.before_update()

    def mean_loss(self) -> float:
        """Mean loss per label token; of several processes, their mean is the step's. Waits for the device."""
        assert self._total is not None
        return float(self._total)

    def release_tensors(self) -> None:
        """Release the step's tensors, so that none of them is counted as the method's."""
        self.batches, self._total = [], None
