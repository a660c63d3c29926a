"""APOLLO's update beside the authors' package, and by the definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from driving import attached, gap, method_of, run, run_beside
from grass_tiny import llama, same, weights
from torch import Tensor

from baselines.apollo import Apollo
from baselines.matrices import matrices_of

TINY_EPS = 1e-12
"""The package adds epsilon to sqrt(v), torch's AdamW (and ours) to sqrt(v / (1 - beta2^t)): no matter here."""
CHANNEL = {"rank": 3, "scale_type": "channel", "scale": 4.0, "update_gap": 3}
MINI = {"rank": 1, "scale_type": "tensor", "scale": 16.0, "update_gap": 3}


class SeededAsThePackage(Apollo):
    """APOLLO with apollo_torch's random numbers: seed i for the i-th matrix, and its chain of seeds."""

    def projection(self, weight: Tensor, draw: int) -> Tensor:
        random = pytest.importorskip("apollo_torch.random_projector")
        seed = self.numbers[weight] + 1  # type: ignore[index]
        for _ in range(draw):
            seed = random.next_seed(seed)
        rank = self.options.rank
        side = "right" if weight.shape[0] >= weight.shape[1] else "left"
        projector: Any = random.GradientProjector(rank)
        made: Tensor = projector.get_orthogonal_matrix(weight, rank, type=side, seed=seed)
        return made


def package(model: Any, options: dict[str, Any], *, lr: float, decay: float = 0.0) -> Any:
    matrices = matrices_of(model)
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    low = {
        "rank": options["rank"], "scale_type": options["scale_type"], "scale": options["scale"],
        "update_proj_gap": options["update_gap"], "proj": "random", "proj_type": "std",
    }  # fmt: skip
    # the package numbers its seeds by the order of the groups
    groups = [{"params": matrices, **low}, {"params": others}]
    return pytest.importorskip("apollo_torch").APOLLOAdamW(groups, lr=lr, eps=TINY_EPS, weight_decay=decay)


def beside(method: type[Apollo], options: dict[str, Any], *, steps: int, lr: float = 3e-3) -> tuple[float, float]:
    """(largest gap between losses, largest gap between weights as a share of how far weights moved)."""
    model = llama()
    theirs = run_beside(model, package(model, options, lr=lr).step, steps)
    own = attached(method_of(method, options, lr=lr, eps=TINY_EPS))
    ours = run(own, 0, steps)
    assert own.model is not None
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True)), gap(own.model, model) / gap(own.model, llama())


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("options", [CHANNEL, MINI], ids=["channel", "tensor"])
def test_every_step_equals_the_packages(options: dict[str, Any], decay: float) -> None:
    """apollo_torch/apollo.py, same projections and same gradients: ten steps, a new projection at every third.

    Gradients are random and grow and shrink, so that the limiter acts in some steps. Matrices are tall, wide, square.
    """
    own = method_of(SeededAsThePackage, options, lr=1e-2, eps=TINY_EPS, weight_decay=decay)
    ours, theirs = llama(), llama()
    own.attach(ours)
    step = package(theirs, options, lr=1e-2, decay=decay).step
    shapes = {(m.shape[0] > m.shape[1]) - (m.shape[0] < m.shape[1]) for m in own.numbers}
    assert shapes == {-1, 0, 1}
    generator = torch.Generator().manual_seed(1)
    for size in (1.0, 3.0, 0.2, 0.2, 0.9, 1.0, 1.0, 8.0, 0.1, 1.0):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = size * torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        own.end_step(lambda: iter(()))
        step()
        for p, q, name in zip(own.numbers, matrices_of(theirs), range(99), strict=False):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6, msg=lambda m, name=name: f"matrix {name}: {m}")


def test_the_first_step_is_the_papers() -> None:
    """Float64, algorithm 1: at the first step N is the sign of R times the bias corrections' inverse.

    With them |N| = 1, so a channel of a tall matrix moves by lr sqrt(scale) sqrt(r) / ||r_i|| times its gradient.
    """
    method = method_of(Apollo, {**CHANNEL, "targets": ("up_proj",)}, lr=1e-2, eps=TINY_EPS)
    model = llama()
    method.attach(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    start, gradient = weight.detach().double(), torch.randn(32, 16, generator=torch.Generator().manual_seed(2))
    weight.grad = gradient.clone()
    low = gradient.double() @ method.projection(weight, 0).double().T
    method.end_step(lambda: iter(()))
    expected = start - 1e-2 * 2.0 * math.sqrt(3) / low.norm(dim=1, keepdim=True) * gradient.double()
    torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [CHANNEL, MINI], ids=["channel", "tensor"])
def test_fifty_steps_stay_beside_the_package(options: dict[str, Any]) -> None:
    """Rounding apart: bias correction is applied to v here and to the rate there."""
    losses, share = beside(SeededAsThePackage, options, steps=50)
    assert losses < 5e-6
    assert share < 1e-3


class TakesScaleAsItIs(SeededAsThePackage):
    def _update(self, weight: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        super()._update(weight, state, {**group, "lr": group["lr"] * self.options.scale**0.5})


class ForgetsTheLimiter(SeededAsThePackage):
    def _update(self, weight: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        state.pop("update_norm", None)
        super()._update(weight, state, group)


class NeverRedraws(SeededAsThePackage):
    def projection(self, weight: Tensor, draw: int) -> Tensor:
        return super().projection(weight, 0)


@pytest.mark.parametrize("broken", [TakesScaleAsItIs, ForgetsTheLimiter, NeverRedraws])
def test_defect_is_caught(broken: type[Apollo], record_property: Callable[[str, object], None]) -> None:
    losses, _ = beside(broken, CHANNEL, steps=12)
    record_property("defect", f"Apollo: {broken.__name__}")
    record_property("caught_by", f"twelve steps beside the package: losses {losses:.1e} apart")
    assert losses > 1e-3


def test_projections_have_the_papers_law_and_change_with_every_draw() -> None:
    """Paper, algorithm 1: independent N(0, 1/r). A draw can be made again; another matrix, draw or seed is another."""
    method, other = method_of(Apollo, {"rank": 8}, seed=3), method_of(Apollo, {"rank": 8}, seed=4)
    method.attach(llama()), other.attach(llama())
    gate, up = list(method.numbers)[4:6]
    many = torch.stack([method.projection(gate, draw) for draw in range(100)])
    assert many.shape == (100, 8, 16)
    assert float(many.var()) == pytest.approx(1 / 8, rel=0.05)
    assert torch.equal(method.projection(gate, 7), many[7])
    assert not torch.equal(many[8], many[7])
    assert not torch.equal(method.projection(up, 7), many[7])
    assert not torch.equal(other.projection(list(other.numbers)[4], 7), many[7])


def test_state_survives_a_resume_and_holds_no_projection() -> None:
    """Ten steps in one go, and six with a new method for the last four; a seed stands for the projection (paper)."""
    straight, before = attached(method_of(Apollo, CHANNEL)), attached(method_of(Apollo, CHANNEL))
    run(straight, 0, 10), run(before, 0, 6)
    assert straight.model is not None
    assert before.model is not None
    after = attached(method_of(Apollo, CHANNEL), before.model)
    after.load_state_dict(before.state_dict())
    run(after, 6, 10)
    assert same(weights(straight.model), weights(before.model))
    gate = list(after.numbers)[4]
    assert gate.shape == (32, 16)
    state = after.optimizer.state[gate]
    numbers = {key: value.numel() for key, value in state.items() if isinstance(value, Tensor)}
    assert numbers == {"exp_avg": 32 * 3, "exp_avg_sq": 32 * 3, "update_norm": 1}


def test_a_rank_above_a_matrix_is_refused_before_and_at_attach() -> None:
    from harness.step.facts import facts_of

    method = method_of(Apollo, {"rank": 9})  # keys and values are 8 wide
    assert "layers.0.self_attn.k_proj.weight, 8" in (method.skip(facts_of(llama())) or "")
    with pytest.raises(ValueError, match="rank 9 is above the smaller side"):
        method.attach(llama())
