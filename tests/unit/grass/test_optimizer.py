"""`Grass` and its AdamW: full fine-tuning as a special case, dtypes, freezing, exact resume."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from grass_tiny import batch, grass_of, layer_weights, llama, same, straight_and_resumed, train, weights
from torch import nn

from grass.adamw import AdamW


def with_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = (torch.randn(p.shape, generator=generator) * 10 ** float(torch.randn((), generator=generator))).to(
            p.dtype
        )


@pytest.mark.parametrize("form", [{"fused": True}, {"foreach": False}], ids=["kernel", "operations"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95)])
def test_our_adamw_is_torchs_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch, decay: float, betas: tuple[float, float], form: dict[str, bool]
) -> None:
    """In pieces of 64 entries, with rests of every kind behind them."""
    monkeypatch.setattr("grass.host.Host.piece_elements", lambda host, device: 64)
    if "foreach" in form:
        monkeypatch.setattr("grass.adamw.Entries.fits_kernel", False)
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(43, 11))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    options: dict[str, Any] = {"lr": 1e-2, "betas": betas, "eps": 1e-6, "weight_decay": decay}
    mine, torchs = AdamW(ours, **options), torch.optim.AdamW(theirs, **options, **form)
    for step in range(20):
        with_gradients(ours, step)
        with_gradients(theirs, step)
        if step == 10:  # the rate is read from the group at every step
            mine.param_groups[0]["lr"] = torchs.param_groups[0]["lr"] = 3e-3
        mine.step()
        torchs.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p, q), f"step {step}"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sampler", ["importance", "static", "uniform"])
def test_with_all_layers_awake_grass_is_full_fine_tuning_to_the_last_bit(sampler: Any, *, tied: bool) -> None:
    """AdamW of torch, clipping of torch, a schedule of torch on both sides; clipping bites."""
    mine, theirs = llama(tied=tied), llama(tied=tied)
    opt = grass_of(mine, active_layers=4, sampler=sampler, weight_decay=0.1, max_grad_norm=0.5)
    full = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1, fused=True)

    def warm(step: int) -> float:
        return min(1, (step + 1) / 4) * 0.9**step

    one = torch.optim.lr_scheduler.LambdaLR(opt, warm)
    other = torch.optim.lr_scheduler.LambdaLR(full, warm)
    for step in range(8):
        losses = [model(**batch(step)).loss for model in (mine, theirs)]
        assert torch.equal(losses[0], losses[1])
        for loss in losses:
            loss.backward()
        norm = float(nn.utils.clip_grad_norm_(theirs.parameters(), 0.5))
        full.step()
        opt.step()
        assert opt.last_grad_norm == norm
        assert norm > 0.5
        one.step()
        other.step()
        opt.zero_grad()
        full.zero_grad()
        assert same(weights(mine), weights(theirs)), f"step {step}"


def test_bf16_weights_keep_fp32_moments_through_a_save() -> None:
    model = llama(dtype=torch.bfloat16)
    opt = grass_of(model, active_layers=4)
    train(model, opt, 0, 3)
    again = grass_of(llama(dtype=torch.bfloat16), active_layers=4)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    plain = AdamW([nn.Parameter(torch.ones(3, dtype=torch.bfloat16))], lr=0.1)
    plain.param_groups[0]["params"][0].grad = torch.ones(3, dtype=torch.bfloat16)
    plain.step()
    reloaded = AdamW([nn.Parameter(torch.ones(3, dtype=torch.bfloat16))], lr=0.1)
    reloaded.load_state_dict(plain.state_dict())
    for optimizer in (opt, again, plain, reloaded):
        assert optimizer.state
        for parameter, moments in optimizer.state.items():
            assert parameter.dtype == torch.bfloat16
            assert {moments["exp_avg"].dtype, moments["exp_avg_sq"].dtype} == {torch.float32}


def test_the_second_moment_of_bf16_weights_decays() -> None:
    # in bf16, 0.999 v rounds back to v: the reason why the moments have a dtype of their own
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    opt = AdamW([parameter], lr=0.0)
    parameter.grad = torch.ones_like(parameter)
    opt.step()
    first = opt.state[parameter]["exp_avg_sq"].clone()
    parameter.grad = torch.zeros_like(parameter)
    for _ in range(10):
        opt.step()
    assert float(opt.state[parameter]["exp_avg_sq"]) == pytest.approx(float(first) * 0.999**10, rel=1e-5)


@pytest.mark.parametrize("state", ["keep", "reset"])
def test_sleeping_layers_are_bitwise_still_and_hold_no_gradient(state: Any) -> None:
    model = llama()
    opt = grass_of(model, sampler="uniform", state=state, weight_decay=0.1)
    sets = set()
    for step in range(12):
        asleep = [i for i in range(4) if i not in opt.active]
        before = [layer_weights(opt, i) for i in asleep]
        awake = [layer_weights(opt, i) for i in opt.active]
        sets.add(opt.active)
        model(**batch(step)).loss.backward()
        assert all(p.grad is None and not p.requires_grad for i in asleep for p in opt.layer_parameters[i])
        assert all(p.grad is not None for i in opt.active for p in opt.layer_parameters[i])
        active = opt.active
        opt.step()
        for layer, kept in zip(asleep, before, strict=True):
            assert all(torch.equal(p, k) for p, k in zip(opt.layer_parameters[layer], kept, strict=True))
        for layer, old in zip(active, awake, strict=True):
            assert not any(torch.equal(p, o) for p, o in zip(opt.layer_parameters[layer], old, strict=True))
        # those that fall asleep now must not carry a gradient into their sleep
        assert all(p.grad is None for i in range(4) if i not in opt.active for p in opt.layer_parameters[i])
        opt.zero_grad()
    assert len(sets) > 1


def test_layers_awake_at_different_times_count_their_own_steps() -> None:
    model = llama()
    opt = grass_of(model, sampler="uniform", active_layers=1)
    steps = [0, 0, 0, 0]
    for step in range(15):
        steps[opt.active[0]] += 1
        train(model, opt, step, step + 1)
    counted = [{opt.state[p]["step"] if p in opt.state else 0 for p in params} for params in opt.layer_parameters]
    assert counted == [{n} for n in steps]
    assert len([n for n in steps if n]) > 1
    head = next(iter(model.lm_head.parameters()))
    assert opt.state[head]["step"] == 15


def test_sleepers_keep_their_moments_or_lose_them_as_asked() -> None:
    for state, expected in (("keep", True), ("reset", False)):
        model = llama()
        opt = grass_of(model, sampler="uniform", active_layers=1, state=state)
        visited: set[int] = set()
        for step in range(9):
            visited.update(opt.active)
            train(model, opt, step, step + 1)
        assert len(visited) > 1
        asleep = [i for i in visited if i not in opt.active]
        assert asleep
        assert all((p in opt.state) is expected for i in asleep for p in opt.layer_parameters[i])


def test_clipping_changes_the_update_and_not_what_is_measured() -> None:
    measured = []
    for limit in (None, 1e-3):
        model = llama()
        opt = grass_of(model, sample_every=1, max_grad_norm=limit)
        probed = list(opt.importance.values) if opt.importance else []
        train(model, opt, 0, 1)
        assert opt.importance is not None
        assert opt.importance.values != probed
        measured.append((opt.importance.values, opt.last_grad_norm))
    assert measured[0] == measured[1]


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("state", ["keep", "reset"])
def test_a_resumed_run_ends_as_if_nothing_had_happened(stop: int, state: Any, tmp_path: Any) -> None:
    """Period 3, refresh every 6: stops in mid-period, at a draw, just before, at and after a refresh."""
    options: dict[str, Any] = {"refresh_every": 6, "state": state, "max_grad_norm": 0.5, "temperature": 0.2}
    opt, after = straight_and_resumed(stop, tmp_path / "state.pt", "active", **options)
    assert (after.active, after.probability) == (opt.active, opt.probability)
    assert after.importance == opt.importance
    assert after.age_steps == opt.age_steps


def test_a_saved_state_is_not_changed_by_further_training() -> None:
    model = llama()
    opt = grass_of(model)
    train(model, opt, 0, 4)
    saved = copy.deepcopy(opt.state_dict()["grass"])
    state = opt.state_dict()["grass"]
    train(model, opt, 4, 7)
    assert state["belief"]["importance"] == saved["belief"]["importance"]
    assert state["active"] == saved["active"]
    assert torch.equal(state["belief"]["sampler"]["generator"], saved["belief"]["sampler"]["generator"])
    for layer, (total, steps) in saved["belief"]["window"].items():
        assert torch.equal(state["belief"]["window"][layer][0], total)
        assert state["belief"]["window"][layer][1] == steps
