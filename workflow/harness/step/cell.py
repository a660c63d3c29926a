"""Runs training steps of one cell: the same code on fake tensors, on a CPU and on a GPU.

Nothing here measures: the caller owns clock and meters, and is told when each phase begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from baselines.method import torch_dtype
from grass.host import current, using
from grass.layers import find_layers
from harness.errors import first_line
from harness.step.architecture import asked_attention, check_length
from harness.step.attach import attach, new_method, refusals
from harness.step.draws import ForcedDraws, Policy, bottom_and_top
from harness.step.facts import unreached_as_buffers
from harness.step.loss import chunked_token_loss, logits_are_plain, loss_of, token_loss
from harness.step.model_classes import AutoConfig, AutoModelForCausalLM
from harness.step.observer import Observer
from harness.step.run import Batch, Part, StepContext, run_step
from harness.step.spec import Cell, Geometry, Shape
from harness.study.strict_yaml import ConfigError

Phase = Literal["load", "probe", "resample", "forward", "backward", "update", "observe", "evaluate"]
"""The last two are the harness's own: the observer's probe and validation."""
STEPS_PER_DRAW = 2
"""Steps between two draws in a cell: in the first a method observes memory, in the second it acts on what it saw (see
`grass.offload.headroom`). The period in the method's config entry does not change peak memory, and would make it slow
to try every draw."""


def configuration(model: Geometry | Path) -> Any:
    """The model's transformers configuration.

    Raises:
        ConfigError: transformers cannot read the folder's config.json.
    """
    if isinstance(model, Path):
        try:
            return AutoConfig.from_pretrained(model)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"{model}/config.json: {first_line(error)}") from error
    return AutoConfig.for_model(model.architecture, **model.fields())


def build_model(model: Geometry | Path, *, weight_dtype: Literal["fp32", "bf16"], device: str) -> nn.Module:
    """A causal language model with random weights, in training mode, every parameter requiring a gradient (see
    `unreached_as_buffers`).

    Raises:
        ConfigError: the geometry's model does not have the published number of parameters.
    """
    config = configuration(model)
    with torch.device(device):
        built: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch_dtype(weight_dtype), attn_implementation=asked_attention(config)
        )
    built.tie_weights()  # a model without values is not initialised, and transformers then does not tie either
    count = sum(p.numel() for p in built.parameters())
    if isinstance(model, Geometry) and count != model.parameters:
        raise ConfigError(
            f"the {model.architecture} geometry of {model.num_hidden_layers} layers of width {model.hidden_size} makes "
            f"{count:,} parameters, and its `parameters` says {model.parameters:,}; correct one of them"
        )
    return unreached_as_buffers(built, as_built=built).train()


class RandomBatches:
    """Batches of random tokens, all of them targets, no padding; also serves as `baselines.method.Calibration`."""

    def __init__(self, shape: Shape, *, vocabulary: int, chunked: bool, autocast: bool, device: str, seed: int) -> None:
        self._shape, self._vocabulary, self._device, self._seed = shape, vocabulary, device, seed
        self._loss = loss_of(chunked=chunked, autocast=autocast)

    def batch(self, number: int) -> dict[str, Tensor]:
        """Batch `number`, the same one at every call."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        size = (self._shape.batch, self._shape.length)
        ids = torch.randint(0, self._vocabulary, size, generator=generator).to(self._device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def batches(self, count: int) -> Iterator[Mapping[str, Tensor]]:
        """The first `count` calibration batches."""
        return (self.batch(-1 - number) for number in range(count))

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean loss per target. Every token but a row's first is a target, so the labels need not be read."""
        return self._loss(model, batch) / (self._shape.batch * (self._shape.length - 1))


class CellRun:
    """A cell with its model built and its method attached, on one device.

    Args:
        cell: what to run.
        steps: number of steps that will be run, for the recipe.
        device: `cpu` or `cuda`.
        enter: called with each phase as it begins; `resample` also begins inside `update` if a method draws there.
        policy: chooses the layers of draws made before the first step.
        steps_per_draw: steps between two draws; overrides the method's config entry.

    Raises:
        CannotRunError: a package is missing, the method refuses, or the model has too few positions for the length;
            the message is the reason.
    """

    def __init__(
        self,
        cell: Cell,
        *,
        steps: int,
        device: Literal["cpu", "cuda"],
        enter: Callable[[Phase], None],
        policy: Policy = bottom_and_top,
        steps_per_draw: int = STEPS_PER_DRAW,
    ) -> None:
        self._enter = enter
        # the second micro-batch runs with the gradients of the first alive; a third adds nothing to peak memory
        self._micro_batches = min(2, cell.micro_batches)
        known = cell.method_class().Config.model_fields
        options = dict(cell.options)
        if "sample_every" in known:
            options |= {"sample_every": steps_per_draw}
            options |= {"refresh_every": None} if "refresh_every" in known else {}
        recipe = cell.recipe(steps=steps, device=device)
        self.method = new_method(cell.module, options, recipe=recipe, lr=cell.lr, seed=cell.seed)
        self.draws = ForcedDraws(current(), policy=policy, on_draw=lambda: enter("resample"))
        enter("load")
        self.model = build_model(cell.model, weight_dtype=cell.numerics.weight_dtype, device=device)
        check_length(self.model, cell.shape.length, what="the length of a row")
        self._cell = cell
        self._vocabulary = int(self.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
        self.batches = self._random(cell.shape)
        self.method.calibration = self.batches
        with refusals():
            self._observer = Observer(find_layers(self.model))
        with using(self.draws):
            self._attached = attach(self.method, self.model)
        self.module, self.facts = self._attached.module, self._attached.facts
        self.promise = self._attached.promise
        enter("load")

    def prepare(self) -> None:
        """Run the measurements that the method makes before the first step."""
        self._enter("probe")
        with using(self.draws):
            self.method.prepare(self.batches)

    def step(self, number: int, *, then: Policy | None = None) -> None:
        """Run optimizer step `number`; `then` is the policy of draws made at its end, for the next step."""
        with using(self.draws):
            run_step(self._attached, number, lr_factor=1.0, context=_CellStep(self, number, then))

    def zero_gradient_step(self, number: int, *, then: Policy | None = None) -> None:
        """Step `number` with zero gradients and no forward or backward pass: it still allocates optimizer states.

        Matrices that already have states are skipped, for speed; vectors never are, so that no step is empty. A method
        that consumes its gradients during backward runs a whole step instead: no gradient would be left to set to zero.
        """
        if self.promise.gradients == "consumed":
            self.step(number, then=then)
            return
        with using(self.draws):
            self._enter("resample")
            self.method.set_lr_factor(1.0)
            self.method.begin_step(number)
            self._enter("update")
            states = {} if self.method.optimizer is None else self.method.optimizer.state
            for parameter in self.module.parameters():
                if parameter.requires_grad and (parameter.dim() == 1 or parameter not in states):
                    parameter.grad = torch.zeros_like(parameter)
            batch = self.batches.batch(number)
            self._enter("update")
            self._then(then)
            self.method.end_step(lambda: (self.batches.loss(self.module, b) for b in (batch,)))

    def look(self, *, observed: Shape, evaluated: Shape) -> None:
        """What the harness does besides training: the observer's probe on one batch, and one batch of validation."""
        self._enter("observe")
        batch = self._random(observed).batch(0)
        self._observer.observe(self.module, [batch])
        self._enter("evaluate")
        self.module.eval()
        with torch.no_grad():
            if logits_are_plain(self.module, batch):
                chunked_token_loss(self.module, self._random(evaluated).batch(0))
            else:
                row = Shape(batch=1, length=evaluated.length)
                token_loss(self.module, self._random(row).batch(0))
        self.module.train()

    def _random(self, shape: Shape) -> RandomBatches:
        """Batches of `shape`."""
        return RandomBatches(
            shape,
            vocabulary=self._vocabulary,
            chunked=self._cell.settings.chunked_loss,
            autocast=self.method.recipe.autocast,
            device=self.method.recipe.device,
            seed=self._cell.seed,
        )

    def _then(self, policy: Policy | None) -> None:
        """Set the policy of the draws that the step makes at its end."""
        self.draws.policy = policy or self.draws.policy


class _CellStep(StepContext):
    """One step of a cell."""

    def __init__(self, run: CellRun, number: int, then: Policy | None) -> None:
        self._run, self._number, self._next_policy = run, number, then

    @contextmanager
    def part(self, part: Part) -> Iterator[None]:
        """Report the part to the cell's `enter` callback."""
        self._run._enter("resample" if part == "begin" else part)
        yield

    def micro_batches(self) -> Sequence[Batch]:
        """The same batch for each step of gradient accumulation."""
        return [self._run.batches.batch(self._number)] * self._run._micro_batches

    def loss(self, module: nn.Module, batch: Batch) -> Tensor:
        """Mean loss per target."""
        return self._run.batches.loss(module, batch)

    def before_update(self) -> None:
        """Set the policy for the draws at the end of the step."""
        self._run._then(self._next_policy)
