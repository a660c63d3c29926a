"""BREAD (OpenReview DBybUx7ARy; block_optim.py of microsoft/BlockOptimizers) against its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grass_tiny import batch, llama
from rival_steps import Hand, adam64, facts_of_llama, recipe_of

from baselines.bread import Bread, BreadOptions

LIMIT = 0.05
"""Clips the active layer's gradient in every step."""


def dense_loop_differs(method_class: type[Bread], **options: Any) -> str | None:
    """Six steps against a loop that holds all gradients at once, in float64.

    block_optim.py: the active block by Adam (state cleared at each switch), every other by
    p.add_(grad, alpha=-lr * scaling) or its sign; scheduled rates for both, weight decay for Adam alone. Ours: clipping
    of the active block alone, nothing outside the layers moves unless asked to.
    """
    period = options.get("period", 2)
    driven = Hand(method_class, {"period": period, **options}, weight_decay=0.1, max_grad_norm=LIMIT)
    weights = {name: w.double() for name, w in driven.start.items()}
    states: dict[str, dict[str, Any]] = {}
    active_before = None
    for number in range(6):
        factor = 1 - number / 10
        dense = llama()
        dense.load_state_dict(driven.weights())
        dense(**batch(number * 10)).loss.backward()
        gradients = {name: p.grad.double() for name, p in dense.named_parameters()}
        seen = driven.step(number, factor=factor)
        (active,) = seen.trace.active
        if number % period == 0:
            states = {}
            if active == active_before:
                return f"layer {active} is active in two periods running"
        elif active != active_before:
            return "the block changed within a period"
        active_before = active
        own = [name for name in gradients if f"layers.{active}." in name]
        norm = float(torch.stack([gradients[name].norm() for name in own]).norm())
        lr = driven.lr * factor
        for name, gradient in gradients.items():
            if name in own:
                clipped = gradient * min(1.0, LIMIT / (norm + 1e-6))
                weights[name] = adam64(weights[name], clipped, states.setdefault(name, {}), lr=lr, decay=0.1)
            elif "layers." in name or options.get("step_outside"):
                step = gradient.sign() if options.get("others") == "sign" else gradient
                weights[name] = weights[name] - lr * driven.method.options.others_lr_ratio * step
        if seen.gradients:
            return f"gradients are left: {sorted(seen.gradients)[:3]}"
        gap = max(float((seen.weights[name].double() - weights[name]).abs().max()) for name in weights)
        if gap > 2e-5:
            return f"after step {number} weights are {gap:.1e} away from the dense loop"
    return None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"others_lr_ratio": 0.5, "order": "descending"},
        {"others": "sign", "others_lr_ratio": 0.1, "order": "ascending"},
        {"step_outside": True},
        {"period": 1, "order": "ascending"},
    ],
    ids=str,
)
def test_six_steps_equal_a_loop_that_holds_all_gradients(options: dict[str, Any]) -> None:
    assert dense_loop_differs(Bread, **options) is None


class KeepsMoments(Bread):
    def _activate(self, block: int) -> None:
        assert self.optimizer is not None
        kept = dict(self.optimizer.state)
        super()._activate(block)
        self.optimizer.state.update(kept)


class StepsTheActiveBlockTwice(Bread):
    def _sgd(self, block: int) -> Any:
        step = super()._sgd(block)

        def hook(parameter: Any) -> None:
            kept, self.active = (self.active, parameter.grad), -2
            step(parameter)
            self.active = kept[0]
            if block == self.active:
                parameter.grad = kept[1]

        return hook


class NeverStepsTheOthers(Bread):
    """Plain block coordinate descent."""

    def _sgd(self, block: int) -> Any:
        def hook(parameter: Any) -> None:
            if block != self.active:
                parameter.grad = None

        return hook


@pytest.mark.parametrize("broken", [KeepsMoments, StepsTheActiveBlockTwice, NeverStepsTheOthers])
def test_a_broken_update_is_caught(broken: type[Bread]) -> None:
    # with one step a block, the fifth step comes back to the first layer, whose moments must be gone
    assert dense_loop_differs(broken, period=1, order="ascending") is not None


def test_gradients_of_inactive_layers_are_never_alive_together() -> None:
    """The hook frees each as it comes: at most one tensor's, while the active layer's wait for the update."""
    driven = Hand(Bread, {"period": 2, "order": "descending"})
    alive: list[int] = []

    def count(_: Any) -> None:
        inactive = [
            p for n, parameters in enumerate(driven.method.blocks) if n != driven.method.active for p in parameters
        ]
        alive.append(sum(p.grad is not None for p in inactive))

    for parameters in driven.method.blocks:
        for parameter in parameters:
            # called after the method's own hook
            parameter.register_post_accumulate_grad_hook(count)
    list(driven.steps(2))
    assert len(alive) == 2 * 36
    assert max(alive) == 0


def test_a_backward_pass_outside_training_steps_nothing() -> None:
    """An observer's gradients are its own: the hooks act in the method's own backward alone."""
    driven = Hand(Bread, {"period": 2})
    before = driven.step(0).weights
    driven.model(**batch(5)).loss.backward()
    assert all(torch.equal(w, before[name]) for name, w in driven.weights().items())
    assert all(p.grad is not None for parameters in driven.method.blocks for p in parameters)


@pytest.mark.parametrize(
    ("order", "sweep"), [("ascending", [0, 1, 2, 3]), ("descending", [3, 2, 1, 0]), ("random", None)]
)
def test_every_sweep_visits_every_layer_once(order: str, sweep: list[int] | None) -> None:
    """_update_active_block_idx: cyclic, or a new permutation for every sweep."""
    method = Hand(Bread, {"period": 1, "order": order}, seed=2).method
    visited = []
    for step in range(24):
        method.begin_step(step)
        visited.append(method.active)
    sweeps = [visited[n : n + 4] for n in range(0, 24, 4)]
    assert all(sorted(one) == [0, 1, 2, 3] for one in sweeps)
    assert sweeps == [sweep] * 6 if sweep else len({tuple(one) for one in sweeps}) > 3


@pytest.mark.parametrize("weight_dtype", ["fp32", "bf16"])
def test_low_rank_trains_all_factors_beside_the_active_layer_and_clears_all_moments_at_a_switch(
    weight_dtype: str,
) -> None:
    """lora_mode="all": the factors are part of every block; switching clears the whole optimizer state."""
    options = {"period": 2, "others": "low_rank", "rank": 4, "alpha": 8}
    driven = Hand(Bread, options, weight_decay=0.1, max_grad_norm=LIMIT, weight_dtype=weight_dtype)
    weights = {name: w.double() for name, w in driven.weights().items()}
    states: dict[str, dict[str, Any]] = {}
    for number in range(5):
        if number % 2 == 0:
            states = {}
            # a switch rounds what its copy held in fp32
            weights = {name: w.double() for name, w in driven.weights().items()}
        seen = driven.step(number)
        (active,) = seen.trace.active
        own = {n for n in weights if "lora_" in n or f"layers.{active}." in n}
        assert set(seen.gradients) == own
        norm = float(torch.stack([g.double().norm() for g in seen.gradients.values()]).norm())
        for name, gradient in seen.gradients.items():
            clipped = gradient.double() * min(1.0, LIMIT / (norm + 1e-6))
            weights[name] = adam64(weights[name], clipped, states.setdefault(name, {}), lr=driven.lr, decay=0.1)
        coarse = weight_dtype == "bf16"
        for name, w in weights.items():
            tolerance = 0.01 * float(w.abs().max()) if coarse and "lora_" not in name else 2e-5
            assert float((seen.weights[name].double() - w).abs().max()) < tolerance, name


def test_steps_too_small_for_bf16_add_up_in_the_active_layer_alone() -> None:
    """_update_param: the active block has an fp32 copy; sgd_hook: the others step in bf16, where small steps vanish."""
    driven = Hand(Bread, {"period": 40, "order": "ascending"}, lr=3e-6, weight_dtype="bf16")
    last = list(driven.steps(20))[-1]

    def moved(layer: int) -> float:
        names = [n for n in last.weights if f"layers.{layer}." in n and "proj" in n]
        return float(torch.cat([(last.weights[n] != driven.start[n]).flatten() for n in names]).float().mean())

    assert moved(0) > 0.1
    assert moved(1) < 0.01


@pytest.mark.parametrize(("others", "refused"), [("sgd", True), ("sign", True), ("low_rank", False)])
def test_accumulation_is_refused_where_every_backward_pass_updates(others: str, refused: bool) -> None:
    recipe = recipe_of(batch_size=4, micro_batch_size=2)
    method = Bread(BreadOptions(others=others), recipe=recipe, lr=1e-3, seed=0)  # type: ignore[arg-type]
    said = method.skip(facts_of_llama(llama()))
    assert (said is not None and "gradient accumulation" in said) is refused
