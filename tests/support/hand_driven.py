"""A method attached to a tiny Llama and driven step by step, as the harness drives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from grass_tiny import batch, llama, weights
from torch import Tensor, nn

from baselines.method import Method, Recipe

LR = 1e-2


def recipe(**changes: Any) -> Recipe:
    """A recipe without clipping and decay, unless `changes` say otherwise."""
    plain = {"steps": 50, "batch_size": 2, "micro_batch_size": 2, "max_length": 8, "loss_on": "all", "warmup_steps": 0}
    return Recipe(**{**plain, "max_grad_norm": None, **changes})


class Driven:
    """A method and the module it trains; the model is `grass_tiny.llama` unless one is given."""

    def __init__(
        self, method_class: type[Method], options: dict[str, Any], *, model: Any = None, seed: int = 3, **changes: Any
    ) -> None:
        self.model = llama() if model is None else model
        self.method: Any = method_class(
            method_class.Config.model_validate(options), recipe=recipe(**changes), lr=LR, seed=seed
        )
        self.method.calibration = Calibration()
        self.module: Any = self.method.attach(self.model).train()
        self.losses: list[float] = []

    def run(
        self, first: int, last: int, *, factor: Callable[[int], float] = lambda step: 1.0, look: Any = lambda step: None
    ) -> None:
        """Steps `first` to `last` (excluded); `look(step)` is called before each update, with gradients there."""
        for step in range(first, last):
            self.method.set_lr_factor(factor(step))
            self.method.begin_step(step)
            loss = self.module(**batch(step)).loss
            self.method.backward(loss, last=True)
            look(step)
            self.method.end_step(lambda: iter(()))
            self.losses.append(float(loss.detach()))


class Calibration:
    """Batches that no training step sees."""

    def batches(self, count: int) -> Any:
        """The first `count` batches."""
        return (batch(1000 + number) for number in range(count))

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean loss of a batch."""
        loss: Tensor = model(**batch).loss
        return loss


def exported(driven: Driven, folder: Path) -> dict[str, Tensor]:
    """Weights that the method exports, as plain transformers loads them."""
    from transformers import AutoModelForCausalLM

    driven.method.export(folder)
    return weights(AutoModelForCausalLM.from_pretrained(folder))


def peft_by_hand(
    optimizer_of: Callable[[Any], torch.optim.Optimizer], *, clip: float | None, steps: int, **config: Any
) -> dict[str, Tensor]:
    """Weights after a plain loop over a peft model with peft's own initialisation from seed 3."""
    from peft import LoraConfig, get_peft_model

    model = llama()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **config)
        module = get_peft_model(model, lora).train()
    optimizer = optimizer_of(module)
    for step in range(steps):
        module(**batch(step)).loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return weights(module)


def watch_backward(model: Any) -> set[int]:
    """Set that will hold the decoder layers through which gradients flow back; empty it before each step.

    Checkpointing runs a layer's forward hooks a second time, but nothing flows back into that copy of the output.
    """
    visited: set[int] = set()

    def watch(layer: int) -> Any:
        def mark(_: Any, __: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda _: visited.add(layer))

        return mark

    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(watch(number))
    return visited


def assert_caught(broken: type, detail: str | None, record: Callable[[str, object], None]) -> None:
    """A planted defect must have been found; the summary of the test run says by what."""
    assert detail is not None, f"{broken.__name__} passes"
    record("defect", broken.__name__)
    record("caught_by", detail)
