"""Drives a method by hand on a tiny Llama, step by step, as the training loop would, and keeps what it sees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from grass_tiny import batch, llama
from torch import Tensor

from baselines.method import LayerTrace, Method, ModelFacts, Recipe, StepFacts
from grass import find_layers

LR = 1e-2


@dataclass
class Seen:
    """One step: beliefs after `begin_step`, gradients before clipping, weights after the update."""

    trace: LayerTrace
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    facts: StepFacts


class Hand:
    """A method on a tiny model (4 layers, width 16), driven one step after the other."""

    def __init__(
        self,
        method_class: type[Method],
        options: dict[str, Any],
        *,
        seed: int = 0,
        lr: float = LR,
        model: Any = None,
        **recipe: Any,
    ) -> None:
        self.recipe = recipe_of(**recipe)
        self.model = llama(dtype=dtype_of(self.recipe)) if model is None else model
        self.start = self.weights()
        self.method: Any = method_class(
            method_class.Config.model_validate(options), recipe=self.recipe, lr=lr, seed=seed
        )
        self.method.attach(self.model)
        self.lr = lr

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def step(self, number: int, *, factor: float = 1.0) -> Seen:
        """Step `number`, whose micro-batches are batches `number` * 10 and on."""
        self.method.set_lr_factor(factor)
        self.method.begin_step(number)
        trace = self.method.trace()
        count = self.recipe.accumulation_steps
        for micro in range(count):
            loss = self.model(**batch(number * 10 + micro)).loss / count
            self.method.backward(loss, last=micro == count - 1)
        gradients = {n: p.grad.detach().clone() for n, p in self.model.named_parameters() if p.grad is not None}
        facts = self.method.end_step(lambda: iter(()))
        return Seen(trace, gradients, self.weights(), facts)

    def steps(self, count: int) -> Iterator[Seen]:
        return (self.step(number) for number in range(count))


def recipe_of(**changes: Any) -> Recipe:
    """Steps of two rows, no clipping, constant rate, unless changed."""
    plain: dict[str, Any] = {
        "steps": 12,
        "batch_size": 2,
        "micro_batch_size": 2,
        "max_length": 8,
        "loss_on": "all",
        "warmup_steps": 0,
        "schedule": "constant",
        "max_grad_norm": None,
    }
    return Recipe.model_validate({**plain, **changes})


def dtype_of(recipe: Recipe) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.weight_dtype]


def facts_of_llama(model: Any) -> ModelFacts:
    """What the harness knows of the tiny Llama."""
    found = find_layers(model)
    count = {key: sum(p.numel() for p in found.outside[key]) for key in found.outside}
    return ModelFacts(
        architecture="tiny",
        layer_parameters=tuple(sum(p.numel() for p in layer) for layer in found.layer_parameters()),
        embedding_parameters=count["embedding"],
        head_parameters=count["head"],
        final_norm_parameters=count["final_norm"],
        hidden_size=16,
        tied_embeddings=count["head"] == 0,
        tensor_parameters={name: p.numel() for name, p in model.named_parameters()},
    )


def adam64(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Any],
    *,
    lr: float,
    decay: float = 0.0,
    largest: bool = False,
) -> Tensor:
    """One AdamW step in float64 (betas 0.9 and 0.999, eps 1e-8); `largest`: AMSGrad's second moment.

    Written from Kingma and Ba 2015, algorithm 1, and Reddi et al. 2018, algorithm 2; `state` starts empty.
    """
    g = gradient.double()
    state["t"] = state.get("t", 0) + 1
    state["m"] = 0.9 * state.get("m", 0.0) + 0.1 * g
    state["v"] = 0.999 * state.get("v", 0.0) + 0.001 * g * g
    state["used"] = torch.maximum(state["v"], state["used"]) if largest and "used" in state else state["v"]
    denominator = (state["used"] / (1 - 0.999 ** state["t"])).sqrt() + 1e-8
    state["direction"] = state["m"] / (1 - 0.9 ** state["t"]) / denominator
    return weight * (1 - lr * decay) - lr * state["direction"]
