"""AdaLomo's fused update by hand and beside the authors' package."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from driving import attached, gap, method_of, run
from grass_tiny import batch, llama
from torch import Tensor

from baselines import adalomo
from baselines.adalomo import AdaLomo, adalomo_update


def by_the_paper(weight: Tensor, gradients: list[Tensor], lr: float) -> Tensor:
    """Float64, algorithm 1 with row and column *sums* r and c: v = r c / sum(r); beta_t = 1 - t^-0.8 as in the code."""
    w, r, c = weight.double(), 0.0, 0.0
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        beta = 1 - t**-0.8
        r, c = beta * r + (1 - beta) * g.square().sum(1), beta * c + (1 - beta) * g.square().sum(0)
        u = g / (torch.outer(r, c) / r.sum()).sqrt()
        w = w - lr * max(1e-3, float(w.square().mean().sqrt())) * u / max(1.0, float(u.square().mean().sqrt()))
    return w


@pytest.mark.parametrize("size", [0.5, 1e-6], ids=["ordinary weights", "weights below 1e-3"])
def test_steps_of_a_matrix_are_the_papers(size: float) -> None:
    """Paper, algorithm 1; weights whose RMS is under 1e-3 move as if it were 1e-3."""
    generator = torch.Generator().manual_seed(1)
    weight = size * torch.randn(6, 4, generator=generator)
    gradients = [torch.randn(6, 4, generator=generator) for _ in range(3)]
    expected = by_the_paper(weight, gradients, 0.1)
    state = {"step": 0, "row": torch.zeros(6), "column": torch.zeros(4)}
    for gradient in gradients:
        adalomo_update(weight, gradient, state, lr=0.1)
    torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-7)


def test_the_first_step_of_a_vector_is_its_size_times_the_rate_against_the_sign() -> None:
    """beta_1 = 0, so u is the gradient's sign: worked by hand, RMS(w) = 5 / sqrt(2)."""
    weight = torch.tensor([3.0, 4.0])
    adalomo_update(weight, torch.tensor([0.2, -7.0]), {"step": 0, "square": torch.zeros(2)}, lr=0.1)
    torch.testing.assert_close(weight, torch.tensor([3.0, 4.0]) + 0.1 * 5 / 2**0.5 * torch.tensor([-1.0, 1.0]))


def beside_for_50_steps(monkeypatch: pytest.MonkeyPatch, decay: float = 0.0) -> tuple[float, float]:
    """(largest gap between losses, largest gap between weights) of ours and lomo_optim's AdaLomo."""
    (ours, own), (theirs, model) = _trained_beside(monkeypatch, decay)
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True)), gap(own, model)


def losses_of_50_steps(monkeypatch: pytest.MonkeyPatch) -> tuple[list[float], list[float]]:
    """Of ours and of lomo_optim's, for the figure in docs/."""
    (ours, _), (theirs, _) = _trained_beside(monkeypatch)
    return ours, theirs


def _trained_beside(
    monkeypatch: pytest.MonkeyPatch, decay: float = 0.0
) -> tuple[tuple[list[float], Any], tuple[list[float], Any]]:
    lomo = pytest.importorskip("lomo_optim")
    model = llama()
    with monkeypatch.context() as patched:
        # the package puts its states on a GPU, wherever the model is
        patched.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
        package: Any = lomo.AdaLomo(model, lr=1e-2, loss_scale=None, weight_decay=decay)
    theirs = []
    for step in range(50):
        loss = model(**batch(step)).loss
        package.fused_backward(loss, 1e-2)
        theirs.append(float(loss.detach()))
    own = attached(method_of(AdaLomo, {}, lr=1e-2, weight_decay=decay))
    ours = run(own, 0, 50)
    return (ours, own.model), (theirs, model)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_fifty_steps_stay_beside_the_package(decay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """lomo_optim/adalomo.py without its loss scale, which is for fp16."""
    losses, weights_apart = beside_for_50_steps(monkeypatch, decay)
    assert losses < 5e-6
    assert weights_apart < 1e-5


DEFECTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "updates are not clipped by their RMS": lambda p: p.setattr(adalomo, "LARGEST_UPDATE_RMS", 1e9),
    "beta_t tends to 1 as t^-0.5": lambda p: p.setattr(adalomo, "DECAY_EXPONENT", -0.5),
    "the rate is not relative to the weights": lambda p: p.setattr(adalomo, "SMALLEST_RMS", 1.0),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_defect_is_caught(
    defect: str, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    DEFECTS[defect](monkeypatch)
    losses, _ = beside_for_50_steps(monkeypatch)
    record_property("defect", f"AdaLomo: {defect}")
    record_property("caught_by", f"fifty steps beside the package: losses {losses:.1e} apart")
    assert losses > 1e-4


def test_two_gradients_at_most_are_alive_in_backward() -> None:
    """Ours to show: a gradient is freed before the next parameter's is complete (the package frees it one later)."""
    model = llama()
    alive: list[Any] = []
    most = 0

    def seen(parameter: Tensor) -> None:
        nonlocal most
        assert parameter.grad is not None
        alive.append(weakref.ref(parameter.grad))
        most = max(most, sum(reference() is not None for reference in alive))

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(seen)
    run(attached(method_of(AdaLomo, {}), model), 0, 1)
    assert len(alive) == sum(1 for _ in model.parameters())
    assert most <= 2
    assert all(p.grad is None for p in model.parameters())


def test_a_backward_pass_that_is_not_the_methods_changes_nothing() -> None:
    """The harness's observer runs backward too."""
    model = llama()
    attached(method_of(AdaLomo, {}), model)
    model(**batch(0)).loss.backward()
    assert gap(model, llama()) == 0.0
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("recipe", "named"),
    [({"micro_batch_size": 1}, "gradient accumulation"), ({"max_grad_norm": 1.0}, "clipping (max_grad_norm)")],
)
def test_what_a_fused_update_cannot_do_is_refused_by_name(recipe: dict[str, Any], named: str) -> None:
    from harness.step.facts import facts_of

    reason = method_of(AdaLomo, {}, **recipe).skip(facts_of(llama()))
    assert reason is not None
    assert reason.startswith(named)
    assert method_of(AdaLomo, {}).skip(facts_of(llama())) is None
