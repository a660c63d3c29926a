"""GaLore's update beside the authors' package, and by the definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from driving import attached, gap, method_of, run, run_beside
from grass_tiny import llama, same, weights
from torch import Tensor, nn

from baselines import galore
from baselines.galore import GaLore, project_gradients, top_singular_vectors
from baselines.matrices import matrices_of, rank_too_large
from grass.adamw import AdamW

SHAPES = [(12, 5), (5, 12), (8, 8)]
TINY_EPS = 1e-12
"""The package adds epsilon to sqrt(v), torch's AdamW (and ours) to sqrt(v / (1 - beta2^t)): no matter here."""


def package() -> Any:
    return pytest.importorskip("galore_torch").GaLoreAdamW


def package_groups(model_or_weights: Any, **low: Any) -> list[dict[str, Any]]:
    matrices, rest = model_or_weights
    return [{"params": rest}, {"params": matrices, "proj_type": "std", **low}]


def own_optimizer(matrix: nn.Parameter, *, decay: float, rank: int, update_gap: int, scale: float) -> AdamW:
    optimizer = AdamW([matrix], lr=1e-2, eps=TINY_EPS, weight_decay=decay)
    project_gradients(optimizer, [matrix], rank=rank, update_gap=update_gap, scale=scale)
    return optimizer


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_every_step_equals_the_packages(shape: tuple[int, int], decay: float) -> None:
    """Seven steps, a new projection at every third; galore_torch/adamw.py, moments not rotated, decay at the end."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    low = {"rank": 3, "update_proj_gap": 3, "scale": 0.5}
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    beside = package()(
        [{"params": [theirs], "proj_type": "std", **low}],
        lr=1e-2, eps=TINY_EPS, weight_decay=decay, no_deprecation_warning=True,
    )  # fmt: skip
    own = own_optimizer(ours, decay=decay, rank=3, update_gap=3, scale=0.5)
    for _ in range(7):
        gradient = torch.randn(shape, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        own.step()
        beside.step()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def first_step(gradient: Tensor, rank: int, scale: float) -> Tensor:
    """Float64: at the first step Adam's N is the sign of R, so W moves by -lr * scale * P sign(P^T G)."""
    u, _, vh = torch.linalg.svd(gradient.double(), full_matrices=False)
    if gradient.shape[0] >= gradient.shape[1]:
        return -1e-2 * scale * torch.sign(gradient.double() @ vh[:rank].T) @ vh[:rank]
    return -1e-2 * scale * u[:, :rank] @ torch.sign(u[:, :rank].T @ gradient.double())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_first_step_is_the_papers(shape: tuple[int, int]) -> None:
    """Paper, algorithm 2, in float64."""
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    weight = nn.Parameter(torch.zeros(shape))
    weight.grad = gradient.clone()
    own_optimizer(weight, decay=0.0, rank=2, update_gap=200, scale=0.25).step()
    torch.testing.assert_close(weight.detach().double(), first_step(gradient, 2, 0.25), rtol=0, atol=1e-6)


def beside_for_50_steps(method: type[GaLore]) -> tuple[float, float, float]:
    """(largest gap between losses, largest gap between weights, how far weights moved) after 50 steps."""
    model = llama()
    matrices = matrices_of(model)
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    beside = package()(
        package_groups((matrices, others), rank=4, update_proj_gap=10, scale=0.5),
        lr=1e-3, eps=TINY_EPS, no_deprecation_warning=True,
    )  # fmt: skip
    theirs = run_beside(model, beside.step, 50)
    own = attached(method_of(method, {"rank": 4, "update_gap": 10, "scale": 0.5}, lr=1e-3, eps=TINY_EPS))
    ours = run(own, 0, 50)
    assert own.model is not None
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True)), gap(own.model, model), gap(own.model, llama())


def test_fifty_steps_stay_beside_the_package() -> None:
    """Rounding apart: bias correction is applied to v here and to the rate there, and errors grow through the SVDs."""
    losses, weights_apart, moved = beside_for_50_steps(GaLore)
    assert losses < 5e-6
    assert weights_apart < 1e-3 * moved


@pytest.mark.parametrize("defect", ["moments restart with every projection", "scale is left out"])
def test_defect_is_caught(
    defect: str, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    real = galore.projected_update

    def broken(weight: Tensor, state: dict[str, Any], group: dict[str, Any], **options: Any) -> None:
        if defect == "scale is left out":
            options["scale"] = 1.0
        elif state.get("step", 1) % 10 == 0:
            for key in ("exp_avg", "exp_avg_sq"):
                state[key].zero_()
        real(weight, state, group, **options)

    monkeypatch.setattr(galore, "projected_update", broken)
    losses, _, _ = beside_for_50_steps(GaLore)
    record_property("defect", f"GaLore: {defect}")
    record_property("caught_by", f"fifty steps beside the package: losses {losses:.1e} apart")
    assert losses > 1e-3


def test_moments_and_projections_survive_a_resume() -> None:
    """Ten steps in one go, and six with a new method for the last four, between two projections."""
    options = {"rank": 4, "update_gap": 5}
    straight = attached(method_of(GaLore, options))
    run(straight, 0, 10)
    before = attached(method_of(GaLore, options))
    run(before, 0, 6)
    assert before.model is not None
    after = attached(method_of(GaLore, options), before.model)
    after.load_state_dict(before.state_dict())
    run(after, 6, 10)
    assert straight.model is not None
    assert same(weights(straight.model), weights(before.model))


def test_a_projection_keeps_only_its_own_vectors_alive() -> None:
    """The package keeps a view of all singular vectors, four times what it needs at rank n / 4."""
    for shape in SHAPES:
        vectors = top_singular_vectors(torch.randn(shape), 2)
        assert vectors.untyped_storage().nbytes() == 2 * min(shape) * 4


def test_a_rank_above_a_matrix_is_refused_before_and_at_attach() -> None:
    from harness.step.facts import facts_of

    model = llama()  # keys and values are 8 wide, everything else at least 16
    facts = facts_of(model)
    assert rank_too_large(8, facts) is None
    assert "layers.0.self_attn.k_proj.weight, 8" in (rank_too_large(9, facts) or "")
    assert rank_too_large(9, facts, ["q_proj"]) is None
    with pytest.raises(ValueError, match="rank 9 is above the smaller side"):
        method_of(GaLore, {"rank": 9}).attach(model)


def test_targets_that_match_nothing_are_an_error() -> None:
    """The Trainer only warns, and memory stays that of full fine-tuning (huggingface/transformers 29822)."""
    with pytest.raises(ValueError, match="'attn' is no linear module"):
        method_of(GaLore, {"rank": 2, "targets": ("attn",)}).attach(llama())
    method = method_of(GaLore, {"rank": 2, "targets": ("q_proj", "down_proj")})
    method.attach(llama())
    assert len(method.matrices) == 8
