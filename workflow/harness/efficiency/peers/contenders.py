"""Training loops that are measured side by side: ours, by the contract, and plain ones around any optimizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from harness.efficiency.arithmetic import PERIOD
from harness.efficiency.uniform_draws import stratified_sets
from harness.step.cell import CellRun, RandomBatches, build_model
from harness.step.draws import Policy
from harness.step.spec import Cell, Geometry, Numerics, Settings, Shape

NEVER = 1 << 30
"""Steps of a run that does not end."""
DRAWS = 12
"""Draws before they begin anew."""
LR = 1e-3
PLAIN = Settings(activation_checkpointing=False, chunked_loss=False)


class Contender(Protocol):
    """One training loop on a model of its own."""

    module: nn.Module
    update: tuple[object, str] | None
    """Object and name of its method that does what comes after backward: clipping, the optimizer's step, dropping
    gradients. None where weights are updated in backward."""

    def step(self, number: int) -> None:
        """Forward, backward and update; steps are counted from 0."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all contenders share: the model's shape and first weights, the batches, the layers drawn."""

    geometry: Geometry
    shape: Shape
    device: Literal["cpu", "cuda"]
    active_layers: int = 2
    seed: int = 0

    def model(self) -> nn.Module:
        """The model, with the same weights at every call."""
        torch.manual_seed(self.seed)
        return build_model(self.geometry, weight_dtype="fp32", device=self.device)

    @property
    def batches(self) -> RandomBatches:
        """Random tokens, the same for everyone."""
        return RandomBatches(
            self.shape,
            vocabulary=self.geometry.vocab_size,
            chunked=False,
            autocast=False,
            device=self.device,
            seed=self.seed,
        )

    def drawn(self, step: int) -> tuple[int, ...]:
        """The decoder layers that train at a step, wherever layers are drawn."""
        sets = stratified_sets(
            self.geometry.num_hidden_layers, self.active_layers, draws=DRAWS, repeat=0, repeats=1, seed=self.seed
        )
        return sets[step // PERIOD % DRAWS]

    def loss(self, contender: Contender, number: int) -> float:
        """Mean loss of a batch, whoever trained the model."""
        with torch.no_grad():
            return float(self.batches.loss(contender.module, self.batches.batch(number)))


class Ours:
    """A method of this project, stepped as the harness steps it."""

    def __init__(
        self,
        bench: Bench,
        module: str,
        options: dict[str, Any],
        *,
        clip: float | None,
        state_dtype: Literal["fp32", "bf16", "int8"] = "fp32",
    ) -> None:
        cell = Cell(
            model=bench.geometry,
            module=module,
            options=options,
            settings=PLAIN,
            shape=bench.shape,
            numerics=Numerics(weight_dtype="fp32", state_dtype=state_dtype, max_grad_norm=clip),
            lr=LR,
            seed=bench.seed,
        )
        self._bench = bench
        torch.manual_seed(bench.seed)
        self.run = CellRun(
            cell, steps=NEVER, device=bench.device, enter=lambda phase: None, policy=self._at(0), steps_per_draw=PERIOD
        )
        self.run.prepare()
        self.module = self.run.module
        consumed = self.run.promise.gradients == "consumed"
        self.update: tuple[object, str] | None = None if consumed else (self.run.method, "end_step")

    def step(self, number: int) -> None:
        """A step by the contract; what it draws at its end is the next step's."""
        self.run.step(number, then=self._at(number + 1))

    def _at(self, step: int) -> Policy:
        """The bench's draw; of a method with one block at a time, the next one."""
        block = step // PERIOD
        return lambda layers, count: (block % layers,) if count == 1 else self._bench.drawn(step)


class Loop:
    """The loop that anyone would write, around an optimizer.

    Args:
        module: trains on the bench's batches.
        optimizer: has `step`.
        clip: largest global norm of the gradients; None does not clip.
        begin: called with a step's number before its forward pass.
    """

    def __init__(
        self,
        bench: Bench,
        module: nn.Module,
        optimizer: Any,
        *,
        clip: float | None,
        begin: Callable[[int], None] = lambda number: None,
    ) -> None:
        self.module, self._optimizer = module, optimizer
        self.update: tuple[object, str] | None = (self, "apply")
        self._batches, self._clip, self._begin = bench.batches, clip, begin

    def step(self, number: int) -> None:
        """Forward, backward, update."""
        self._begin(number)
        self.loss(number).backward()
        self.apply()

    def apply(self) -> None:
        """What comes after backward."""
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self.module.parameters(), self._clip)
        self._optimizer.step()
        # not the optimizer's: some packages' forget what is frozen now
        self.module.zero_grad()

    def loss(self, number: int) -> Tensor:
        """Of the step's batch."""
        return self._batches.loss(self.module, self._batches.batch(number))
