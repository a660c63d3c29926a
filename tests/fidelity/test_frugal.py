"""The signSGD control against its definition: LISA where it draws, the sign of the gradient everywhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grass_tiny import llama
from rival_steps import LR, Hand, facts_of_llama
from torch import Tensor

from baselines.frugal import Frugal
from baselines.lisa import Lisa
from grass import quantised

OPTIONS = {"active_layers": 2, "sample_every": 3}
DECAY = 0.1


def layer_of(name: str) -> int | None:
    return int(name.split(".")[2]) if ".layers." in name else None


def signed(before: Tensor, gradient: Tensor, lr: float) -> Tensor:
    return before.double() * (1 - lr * DECAY) - lr * gradient.double().sign()


def differs_from_its_definition(method_class: type[Frugal], **options: Any) -> str | None:
    """The first tensor of twelve steps whose move is not the one that its layer should make."""
    hand = Hand(method_class, {**OPTIONS, **options}, weight_decay=DECAY)
    lr = LR * options.get("sign_lr_ratio", 0.1)
    before = hand.start
    for number, seen in enumerate(hand.steps(12)):
        for name, gradient in seen.gradients.items():
            layer = layer_of(name)
            sleeping = layer is not None and layer not in seen.trace.active
            if sleeping and not torch.allclose(
                seen.weights[name].double(), signed(before[name], gradient, lr), atol=1e-7
            ):
                return f"{name} at step {number}: no step of signSGD"
            if not sleeping and torch.equal(seen.weights[name], before[name]):
                return f"{name} at step {number}: no move"
            has_state = dict(hand.model.named_parameters())[name] in hand.method.optimizer.state
            if has_state is sleeping:
                return f"{name} at step {number}: state where it should not be, or none"
        before = seen.weights
    return None


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_what_sleeps_moves_by_the_sign_and_has_no_state(ratio: float) -> None:
    assert differs_from_its_definition(Frugal, sign_lr_ratio=ratio) is None


def test_at_a_rate_of_nearly_nothing_it_is_lisa() -> None:
    """The same draws, and the same AdamW where both draw."""
    ours = Hand(Frugal, {**OPTIONS, "sign_lr_ratio": 1e-12}, weight_decay=DECAY)
    lisas = Hand(Lisa, {**OPTIONS, "state": "reset"}, weight_decay=DECAY)
    for mine, theirs in zip(ours.steps(9), lisas.steps(9), strict=True):
        assert mine.trace.active == theirs.trace.active
        for name, weight in theirs.weights.items():
            assert torch.allclose(mine.weights[name], weight, atol=1e-6), name


def test_bf16_weights_move_on_average_though_a_step_is_below_half_a_unit() -> None:
    """Steps of 1e-3 at weights of 1, whose neighbours are 2^-8 below and 2^-7 above: to nearest none would move."""
    model = llama(dtype=torch.bfloat16)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data.fill_(1.0)
    hand = Hand(Frugal, {**OPTIONS, "sample_every": 99}, lr=1e-2, model=model, weight_dtype="bf16")
    signs: dict[str, Tensor] = {}
    for seen in hand.steps(20):
        for name, gradient in seen.gradients.items():
            signs[name] = signs.get(name, torch.zeros(())) + gradient.float().sign()
    names = [n for n in signs if "up_proj" in n and layer_of(n) not in hand.method.active]
    assert len(names) == 2
    moved = torch.cat([(hand.weights()[n].float() - 1).flatten() for n in names])
    wanted = torch.cat([-1e-3 * signs[n].flatten() for n in names])
    share = (moved * wanted.sign()).sum() / wanted.abs().sum()
    noise = moved.square().sum() ** 0.5 / wanted.abs().sum()
    assert noise < 0.1
    assert abs(share - 1) < 4 * noise


def test_state_is_packed_where_the_recipe_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "SMALLEST", 200)
    hand = Hand(Frugal, OPTIONS, state_dtype="int8")
    hand.step(0)
    assert {s["exp_avg"].dtype for s in hand.method.optimizer.state.values()} == {quantised.PACKED, torch.float32}


def test_layers_of_different_sizes_are_refused() -> None:
    model = llama()
    facts = facts_of_llama(model)
    method = Hand(Frugal, OPTIONS, model=model).method
    assert method.skip(facts) is None
    uneven = type(facts)(**{**vars(facts), "layer_parameters": (100, 200, 100, 100)})
    assert "layers of different sizes, 100 to 200 parameters" in (method.skip(uneven) or "")


class Freezes(Frugal):
    def _freeze(self) -> None:
        Lisa._freeze(self)


class FullRate(Frugal):
    def _move(self, weight: Any, gradient: Any, place: Any, lr: float, weight_decay: float) -> None:
        super()._move(weight, gradient, place, lr * 10, weight_decay)


class RawGradient(Frugal):
    def _move(self, weight: Any, gradient: Any, place: Any, lr: float, weight_decay: float) -> None:
        weight.mul_(1 - lr * weight_decay).sub_(gradient, alpha=lr)


class TwoUpdates(Frugal):
    def _sign_steps(self, optimizer: Any) -> None:
        kept = [(p, p.grad) for p in self.numbers]
        super()._sign_steps(optimizer)
        for parameter, gradient in kept:
            parameter.grad = gradient


class KeepsState(Frugal):
    def _forget_moments(self) -> None: ...


@pytest.mark.parametrize("defect", [FullRate, RawGradient, TwoUpdates, KeepsState])
def test_defects_are_caught(defect: type[Frugal]) -> None:
    assert differs_from_its_definition(defect) is not None


def test_a_frozen_layer_is_caught() -> None:
    """It has no gradient that could be compared."""
    frozen, free = (Hand(method, OPTIONS).step(0).gradients for method in (Freezes, Frugal))
    assert len(free) == len(llama().state_dict())
    assert len(frozen) < len(free)
