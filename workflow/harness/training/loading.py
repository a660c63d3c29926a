"""From a resolved spec to everything that the training loop needs."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from baselines.method import Expectation, Method, ModelFacts, find_method
from grass.layers import find_layers
from harness.inputs.models import load_model, load_tokenizer
from harness.inputs.rows import read_rows
from harness.inputs.tokens import encode_rows
from harness.records.run import DataUse
from harness.step.facts import facts_of
from harness.study.spec import Observation, Training
from harness.training.batches import Batches, fixed_batches
from harness.training.engagement import Watch
from harness.training.observer import Observer

VALIDATION_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Inputs:
    """Where a run finds what it reads: folders that earlier jobs made."""

    model: Path
    rows: Path
    model_text: str = ""
    """The model's folder as its manifest words it, with no path of this machine in it."""

    def files(self) -> dict[str, Path]:
        """What a run reads, by role."""
        found = {"train rows": self.rows / "train.json", "validation rows": self.rows / "validation.json"}
        return found | {f"model {path.name}": path for path in sorted(self.model.glob("*.safetensors"))}


class CannotRunError(Exception):
    """The method cannot run this recipe on this model: a row of the tables, not a failure."""


@dataclass(frozen=True)
class Loaded:
    """A model with a method attached, and what watches over it."""

    method: Method
    module: nn.Module
    """What trains: the model, perhaps wrapped."""
    own_parameters: list[nn.Parameter]
    """The model's parameters before any method touched it."""
    facts: ModelFacts
    promise: Expectation
    watch: Watch
    observer: Observer
    batches: Batches
    validation: list[dict[str, Tensor]]
    observed: list[dict[str, Tensor]]
    """Fixed validation rows of the observer probe."""
    data: DataUse


def load(training: Training, *, lr: float | None, seed: int, inputs: Inputs, observation: Observation | None) -> Loaded:
    """Load model and rows, attach the method.

    Raises:
        CannotRunError: a package is missing, or the method refuses; the message is the reason.
    """
    recipe = training.recipe
    method = _method(training, lr, seed)
    tokenizer = load_tokenizer(inputs.model)
    cut = {"max_length": recipe.max_length}
    rows, data = encode_rows(tokenizer, read_rows(inputs.rows / "train.json"), loss_on=recipe.loss_on, **cut)
    held, _ = encode_rows(tokenizer, read_rows(inputs.rows / "validation.json"), loss_on="answer", **cut)
    model: Any = load_model(inputs.model, weight_dtype=recipe.weight_dtype).to(recipe.device)
    if recipe.activation_checkpointing:
        # the re-entrant kind needs an input that requires grad; the hook it installs would force backward to visit
        # every layer below the lowest active one, so it is taken off again
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()
    facts = facts_of(model)
    reason = method.skip(facts)
    if reason is not None:
        raise CannotRunError(reason)
    pad = tokenizer.pad_token_id
    sizes = {"batch_size": recipe.batch_size, "micro_batch_size": recipe.micro_batch_size}
    batches = Batches(rows, **sizes, seed=seed, pad_id=pad, device=recipe.device)
    on_device = {"pad_id": pad, "device": recipe.device}
    validation = fixed_batches(held, size=VALIDATION_ROWS_AT_ONCE, **on_device)
    observed = fixed_batches(held[: observation.rows if observation else 0], size=recipe.micro_batch_size, **on_device)
    layers = find_layers(model)
    own = list(model.parameters())
    observer = Observer(layers.layer_parameters())
    # from here on every new tensor that stays alive is the method's
    watch = Watch(model, layers)
    module = method.attach(model)
    module.train()
    watch.attached(module)
    promise = method.expect(facts)
    return Loaded(method, module, own, facts, promise, watch, observer, batches, validation, observed, data)


def _method(training: Training, lr: float | None, seed: int) -> Method:
    method_class = find_method(training.module)
    missing = [package for package in method_class.REQUIRES if importlib.util.find_spec(package) is None]
    if missing:
        raise CannotRunError(f"needs the package {', '.join(missing)}")
    options = method_class.Config.model_validate(training.options, strict=False)
    return method_class(options, recipe=training.recipe, lr=lr or 0.0, seed=seed)
