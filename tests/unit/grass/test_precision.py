"""Weights and moments in every dtype: bitwise what torch does, or stochastically rounded the same way everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from further import a_few
from grass_tiny import batch, grass_of, llama, same, train, weights

from grass import Grass, quantised
from grass.adamw import AdamW
from grass.host import PIECE_ELEMENTS
from grass.options import STATE_DTYPES

BF16 = torch.bfloat16


def reference_run(model: Any, opt_of_grass: Grass, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """The given AdamW over all parameters, gradients only for the layers that `opt_of_grass` had active."""
    for step in range(steps):
        active = opt_of_grass.history[step].active
        for number, layer in enumerate(model.model.layers):
            layer.requires_grad_(number in active)
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("piece", [16, 1 << 16])
@pytest.mark.parametrize("offload", ["resident", "move"])
@pytest.mark.parametrize(
    ("weight", "state_dtype", "rounding"),
    a_few(
        [
            (torch.float32, "fp32", False),
            (torch.float32, "bf16", False),
            (BF16, "fp32", False),
            (BF16, "fp32", True),
            (BF16, "bf16", True),
            (BF16, "bf16", False),
            (torch.float32, "bf16", True),
            (torch.float32, "int8", False),
            (BF16, "int8", True),
        ],
        one_in=4,
    ),
)
def test_every_mode_and_dtype_is_adamw_on_the_active_layers_bit_for_bit(
    weight: Any, state_dtype: Any, rounding: bool, offload: Any, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PIECE_ELEMENTS, "cpu", piece)
    monkeypatch.setattr(quantised, "SMALLEST", 200)  # so that this model has packed moments and others
    options: dict[str, Any] = {
        "sampler": "uniform", "state_dtype": state_dtype, "stochastic_rounding": rounding,
        "weight_decay": 0.1, "seed": 4,
    }  # fmt: skip
    mine, theirs = llama(dtype=weight), llama(dtype=weight)
    opt = grass_of(mine, offload=offload, **options)
    train(mine, opt, 0, 9)
    everything = [p for group in Grass(theirs, lr=1e-2, active_layers=2).param_groups for p in group["params"]]
    adamw = AdamW(
        everything, lr=1e-2, weight_decay=0.1, seed=4, stochastic_rounding=rounding,
        state_dtype=STATE_DTYPES[state_dtype],
    )  # fmt: skip
    reference_run(theirs, opt, adamw, 9)
    assert same(weights(mine), weights(theirs))
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert (p in opt.state) is (q in adamw.state)
        if p in opt.state:
            assert opt.state[p]["step"] == adamw.state[q]["step"]
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(opt.state[p][key], adamw.state[q][key])
                assert opt.state[p][key].dtype == quantised.stored_dtype(p.numel(), adamw.state_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_with_moments_in_the_weights_dtype_it_is_torchs_adamw_bit_for_bit(dtype: Any) -> None:
    mine, theirs = llama(dtype=dtype), llama(dtype=dtype)
    name: Any = "fp32" if dtype == torch.float32 else "bf16"
    opt = grass_of(mine, sampler="uniform", state_dtype=name, weight_decay=0.1)
    train(mine, opt, 0, 9)
    reference_run(theirs, opt, torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1, fused=True), 9)
    assert same(weights(mine), weights(theirs))


def test_stochastic_rounding_keeps_moving_weights_that_rounding_to_nearest_would_not() -> None:
    """At a rate far below the distance of bf16 numbers hardly a weight moves to nearest; on average all must."""
    moved = {}
    for rounding in (False, True):
        model = llama(dtype=BF16)
        start = weights(model)
        opt = Grass(
            model, lr=1e-5, active_layers=4, sampler="uniform", state_dtype="bf16", stochastic_rounding=rounding
        )
        train(model, opt, 0, 20)
        pairs = [(start[n], p) for n, p in model.named_parameters() if "layers" in n and p.dim() > 1]
        moved[rounding] = sum(int((a != b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
    assert moved[True] > 2 * moved[False]


def test_stochastic_rounding_repeats_under_its_seed_and_differs_under_another() -> None:
    ends = []
    for seed in (0, 0, 1):
        model = llama(dtype=BF16)
        opt = Grass(model, lr=1e-3, active_layers=4, sampler="uniform", stochastic_rounding=True, seed=seed)
        train(model, opt, 0, 3)
        ends.append(weights(model))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


@pytest.mark.parametrize("state_dtype", ["bf16", "int8"])
def test_a_resumed_run_rounds_as_if_nothing_had_happened(state_dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "SMALLEST", 200)
    options: dict[str, Any] = {"stochastic_rounding": True, "state_dtype": state_dtype, "seed": 3}
    straight, first, second = llama(dtype=BF16), llama(dtype=BF16), llama(dtype=BF16)
    opt, before = grass_of(straight, **options), grass_of(first, **options)
    train(straight, opt, 0, 8)
    train(first, before, 0, 4)
    after = grass_of(second, **options)
    second.load_state_dict(first.state_dict())
    after.load_state_dict(before.state_dict())
    train(second, after, 4, 8)
    assert same(weights(second), weights(straight))


def test_a_gradient_scaler_is_refused() -> None:
    model = llama()
    opt = grass_of(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(**batch(0)).loss).backward()
    with pytest.raises(RuntimeError, match="scal"):
        scaler.step(opt)
