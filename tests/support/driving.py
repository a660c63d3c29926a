"""A method driven by hand, and another optimizer beside it: what the fidelity tests of projected methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from grass_tiny import batch, llama
from harness.checking.tiny import RECIPE
from torch import Tensor, nn

from baselines.method import Method, Recipe

Batch = Mapping[str, Tensor]


class Calibration:
    """`baselines.method.Calibration` over random tokens."""

    def batches(self, count: int) -> Iterator[Batch]:
        return (masked(batch(1000 + number)) for number in range(count))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        loss: Tensor = model(**batch).loss
        return loss


def masked(tokens: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tokens, "attention_mask": torch.ones_like(tokens["input_ids"])}


def recipe(**changes: Any) -> Recipe:
    """No warm-up and no clipping, so that nothing but the method's own rule acts."""
    return Recipe.model_validate(
        {
            **RECIPE,
            "schedule": "constant",
            "warmup_steps": 0,
            "max_grad_norm": None,
            "steps": 50,
            "batch_size": 2,
            "micro_batch_size": 2,
            **changes,
        }
    )


def method_of(
    method: type[Method], options: dict[str, Any], *, lr: float = 1e-2, seed: int = 3, **changes: Any
) -> Method:
    return method(method.Config.model_validate(options), recipe=recipe(**changes), lr=lr, seed=seed)


def attached(method: Method, model: nn.Module | None = None) -> Method:
    """The method on a tiny Llama, its calibration done."""
    method.attach(llama() if model is None else model).train()
    method.calibration = Calibration()
    method.prepare(method.calibration)
    return method


def run(method: Method, first: int, last: int) -> list[float]:
    """Steps `first` to `last` at the full rate; returns their losses."""
    losses = []
    for step in range(first, last):
        method.begin_step(step)
        assert method.model is not None
        loss = method.model(**batch(step)).loss
        method.backward(loss, last=True)
        method.end_step(lambda: iter(()))
        losses.append(float(loss.detach()))
    return losses


def run_beside(model: Any, step: Callable[[], None], steps: int) -> list[float]:
    """The same rows under another optimizer; `step` is its `step`."""
    losses = []
    for number in range(steps):
        loss = model(**batch(number)).loss
        loss.backward()
        step()
        model.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def gap(one: nn.Module, other: nn.Module) -> float:
    """Largest difference between any two weights."""
    return max(
        float((p.detach() - q.detach()).abs().max()) for p, q in zip(one.parameters(), other.parameters(), strict=True)
    )
