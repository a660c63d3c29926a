"""What `grass` must hold to on any model, as laws: each is true for all inputs, or exact to the last bit."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from itertools import pairwise, permutations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from grass import Grass, LayerMap, find_layers
from grass.adamw import AdamW
from grass.importance import Importance, Norm, effective_layers, normalise, probabilities
from grass.layers import OUTSIDE
from grass.sampling import draw_layers

# gradient norms as they occur: any scale, zero included
NORM = st.one_of(st.just(0.0), st.floats(1e-12, 1e6))
NORMS = st.lists(NORM, min_size=1, max_size=12)
TEMPERATURE = st.floats(0.05, 50)
SCALINGS: tuple[Norm, ...] = ("none", "mean", "sum", "max", "zscore")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        # a random model's layers matter alike, and GRASS says so; the warnings have tests of their own
        warnings.filterwarnings("ignore", message="GRASS ")
        yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- probabilities


@given(values=NORMS, temperature=TEMPERATURE, norm=st.sampled_from(SCALINGS))
def test_probabilities_sum_to_one_and_are_never_negative(values: list[float], temperature: float, norm: Norm) -> None:
    p = probabilities(values, temperature=temperature, norm=norm)
    assert len(p) == len(values)
    assert min(p) >= 0
    assert math.fsum(p) == pytest.approx(1, abs=1e-12)


@given(values=NORMS, temperature=TEMPERATURE, norm=st.sampled_from(SCALINGS))
def test_a_layer_of_larger_norm_is_never_less_probable(values: list[float], temperature: float, norm: Norm) -> None:
    p = probabilities(values, temperature=temperature, norm=norm)
    ascending = [p[i] for i in sorted(range(len(values)), key=values.__getitem__)]
    assert all(low <= high * (1 + 1e-12) for low, high in pairwise(ascending))


def test_twice_the_norm_is_really_more_probable() -> None:
    for norm in ("mean", "sum", "max", "zscore"):
        low, high = probabilities([1e-6, 2e-6], temperature=1, norm=norm)  # type: ignore[arg-type]
        assert high > 1.2 * low


@given(values=NORMS, norm=st.sampled_from(("mean", "sum", "max", "zscore")))
def test_infinite_temperature_is_uniform(values: list[float], norm: Norm) -> None:
    assert probabilities(values, temperature=1e12, norm=norm) == pytest.approx(
        [1 / len(values)] * len(values), rel=1e-9
    )


@given(
    values=st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=12),
    scale=st.floats(1e-6, 1e6),
    norm=st.sampled_from(("mean", "sum", "max")),
)
def test_the_unit_of_the_gradients_does_not_matter(values: list[float], scale: float, norm: Norm) -> None:
    scaled = probabilities([v * scale for v in values], temperature=0.3, norm=norm)
    assert scaled == pytest.approx(probabilities(values, temperature=0.3, norm=norm), rel=1e-9)


def test_without_scaling_the_unit_decides_everything() -> None:
    # the reason why `mean` is the default: raw values of 1e-5 make any importance uniform
    raw = probabilities([1e-5, 1e-6], temperature=1, norm="none")
    assert raw == pytest.approx([0.5, 0.5], abs=1e-5)


def test_the_scalings_by_hand() -> None:
    assert normalise([1, 2, 3], "none") == [1, 2, 3]
    assert normalise([1, 2, 3], "mean") == [0.5, 1, 1.5]
    assert normalise([1, 2, 3], "sum") == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert normalise([1, 2, 4], "max") == [0.25, 0.5, 1]
    assert normalise([1, 2, 3], "zscore") == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)])
    for norm in SCALINGS:
        assert normalise([0, 0], norm) == [0, 0]
    # p_i / p_j = e^((m_i - m_j) / mean / tau)
    p = probabilities([1, 2, 3], temperature=0.5, norm="mean")
    assert p[2] / p[0] == pytest.approx(math.exp((1.5 - 0.5) / 0.5))


@given(values=NORMS, temperature=TEMPERATURE)
def test_the_effective_number_of_layers_is_from_one_to_all(values: list[float], temperature: float) -> None:
    found = effective_layers(probabilities(values, temperature=temperature, norm="mean"))
    assert 1 - 1e-9 <= found <= len(values) * (1 + 1e-9)


def test_the_effective_number_of_layers_by_hand() -> None:
    assert effective_layers([0.25] * 4) == pytest.approx(4)
    assert effective_layers([1.0, 0.0, 0.0]) == pytest.approx(1)
    assert effective_layers([0.5, 0.5, 0.0]) == pytest.approx(2)


@given(values=st.lists(st.floats(0, 1e3), min_size=3, max_size=8), ema=st.floats(0, 1), new=st.floats(0, 1e3))
def test_a_refresh_moves_measured_layers_only_and_by_the_weight_of_the_new(
    values: list[float], ema: float, new: float
) -> None:
    importance = Importance.from_probe(values)
    importance.refresh({1: new}, ema=ema, step=7)
    assert importance.values[1] == pytest.approx(ema * new + (1 - ema) * values[1])
    assert [v for i, v in enumerate(importance.values) if i != 1] == [v for i, v in enumerate(values) if i != 1]
    assert importance.measured_at == [7 if i == 1 else 0 for i in range(len(values))]


def test_a_refresh_with_the_whole_weight_forgets_the_old() -> None:
    importance = Importance.from_probe([1.0, 2.0])
    importance.refresh({0: 5.0}, ema=1.0, step=1)
    assert importance.values == [5.0, 2.0]
    importance.refresh({0: 9.0}, ema=0.0, step=2)
    assert importance.values == [5.0, 2.0]


# ---------------------------------------------------------------- draws


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=10), seed=st.integers(0, 2**31), data=st.data())
def test_a_draw_is_that_many_distinct_layers_in_order(values: list[float], seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    drawn = draw_layers(values, count, torch.Generator().manual_seed(seed))
    assert len(set(drawn)) == count
    assert list(drawn) == sorted(drawn)
    assert set(drawn) <= set(range(len(values)))


def test_draws_follow_the_probabilities() -> None:
    """Chi-square of 20,000 draws of 2 in 5 against every pair's exact probability, successive and renormalised."""
    p, count, draws = [0.4, 0.3, 0.15, 0.1, 0.05], 2, 20_000
    exact: dict[tuple[int, ...], float] = {}
    for first, second in permutations(range(5), count):
        pair = tuple(sorted((first, second)))
        exact[pair] = exact.get(pair, 0) + p[first] * p[second] / (1 - p[first])
    assert sum(exact.values()) == pytest.approx(1)
    generator = torch.Generator().manual_seed(0)
    seen = dict.fromkeys(exact, 0)
    for _ in range(draws):
        seen[draw_layers(p, count, generator)] += 1
    chi2 = sum((seen[pair] - draws * chance) ** 2 / (draws * chance) for pair, chance in exact.items())
    # 9 degrees of freedom: 33.7 is passed once in ten thousand
    assert chi2 < 33.7


def test_a_weight_need_not_be_normalised() -> None:
    one, other = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for _ in range(50):
        assert draw_layers([0.5, 0.3, 0.2], 2, one) == draw_layers([50, 30, 20], 2, other)


def test_a_probability_that_vanished_still_fills_an_empty_place() -> None:
    generator = torch.Generator().manual_seed(0)
    p = [0.0, 1.0, 0.0, 1e-320]
    # places are filled by what there is
    assert draw_layers(p, 4, generator) == (0, 1, 2, 3)
    # and otherwise as good as never
    drawn = [draw_layers(p, 1, generator) for _ in range(2000)]
    assert set(drawn) == {(1,)}
    assert all(1 in draw_layers(p, 2, generator) for _ in range(500))


def test_a_draw_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw_layers([0.5, 0.5], 1, torch.Generator().manual_seed(1))
    assert torch.equal(before, torch.get_rng_state())


def test_a_count_out_of_range_is_refused() -> None:
    for count in (0, 3):
        with pytest.raises(ValueError, match=rf"active_layers must be from 1 to 2 \(the model's layers\), not {count}"):
            draw_layers([0.5, 0.5], count, torch.Generator())


# ---------------------------------------------------------------- a tiny Llama


def llama(*, layers: int = 4, tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype)


def batch(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def grass_of(model: Any, **options: Any) -> Grass:
    chosen = {"lr": 1e-2, "active_layers": 2, "sample_every": 3, **options}
    opt = Grass(model, **chosen)
    if opt.sampler != "uniform":
        opt.probe([batch(-1), batch(-2)])
    return opt


def train(model: Any, opt: Any, first: int, last: int) -> None:
    for step in range(first, last):
        model(**batch(step)).loss.backward()
        opt.step()
        opt.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def layer_weights(opt: Grass, layer: int) -> list[Tensor]:
    return [p.detach().clone() for p in opt.layer_parameters[layer]]


# ---------------------------------------------------------------- full fine-tuning is a special case


def with_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p.grad = (torch.randn(p.shape, generator=generator) * 10 ** float(torch.randn((), generator=generator))).to(
            p.dtype
        )


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.8, 0.95)])
def test_our_adamw_is_torchs_to_the_last_bit(decay: float, betas: tuple[float, float]) -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(3))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    options: dict[str, Any] = {"lr": 1e-2, "betas": betas, "eps": 1e-6, "weight_decay": decay}
    mine, torchs = AdamW(ours, **options), torch.optim.AdamW(theirs, **options, foreach=False)
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
    full = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)

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


# ---------------------------------------------------------------- dtypes


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


# ---------------------------------------------------------------- freezing and memory of sleepers


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


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("state", ["keep", "reset"])
def test_a_resumed_run_ends_as_if_nothing_had_happened(stop: int, state: Any, tmp_path: Any) -> None:
    """Period 3, refresh every 6: stops in mid-period, at a draw, just before, at and after a refresh."""
    options: dict[str, Any] = {"refresh_every": 6, "state": state, "max_grad_norm": 0.5, "temperature": 0.2}
    straight = llama()
    opt = grass_of(straight, **options)
    train(straight, opt, 0, 11)

    first = llama()
    before = grass_of(first, **options)
    train(first, before, 0, stop)
    torch.save({"model": first.state_dict(), "opt": before.state_dict()}, tmp_path / "state.pt")
    second = llama()
    # another seed and no probe: everything must come from the state
    after = Grass(second, lr=1e-2, active_layers=2, sample_every=3, seed=99, **options)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second.load_state_dict(saved["model"])
    after.load_state_dict(saved["opt"])
    assert after.active == before.active
    train(second, after, stop, 11)

    assert same(weights(second), weights(straight))
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
    assert state["importance"] == saved["importance"]
    assert state["active"] == saved["active"]
    assert torch.equal(state["generator"], saved["generator"])
    for layer, (total, steps) in saved["window"].items():
        assert torch.equal(state["window"][layer][0], total)
        assert state["window"][layer][1] == steps


# ---------------------------------------------------------------- the probe


def test_the_probe_changes_no_weight_leaves_no_gradient_and_restores_every_flag() -> None:
    model = llama()
    opt = Grass(model, lr=1e-2, active_layers=4, train_embedding=False)
    before, flags = weights(model), {name: p.requires_grad for name, p in model.named_parameters()}
    assert set(flags.values()) == {True, False}
    opt.probe([batch(0), batch(1)])
    assert same(before, weights(model))
    assert all(p.grad is None for p in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not opt.state
    assert opt.steps == 0


def test_the_probe_holds_one_gradient_at_a_time() -> None:
    model = llama()
    opt = Grass(model, lr=1e-2, active_layers=4)
    alive: list[int] = []
    handles = [
        # called as soon as the gradient of `p` has been stored, before the optimizer's own hook of `p` frees it
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in model.parameters()))
        )
        for p in model.parameters()
    ]
    opt.probe([batch(0), batch(1)])
    for handle in handles:
        handle.remove()
    assert alive == [1] * 2 * sum(len(parameters) for parameters in opt.layer_parameters)


def test_the_probe_is_the_mean_over_batches_of_the_root_mean_square_gradient() -> None:
    model = llama()
    opt = Grass(model, lr=1e-2, active_layers=2)
    opt.probe([batch(0), batch(1)])
    assert opt.importance is not None
    reference = llama()
    expected = [0.0] * 4
    for seed in (0, 1):
        reference.zero_grad()
        reference(**batch(seed)).loss.backward()
        for layer, parameters in enumerate(find_layers(reference).layer_parameters()):
            entries = torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None])
            expected[layer] += float(entries.square().mean().sqrt()) / 2
    assert opt.importance.values == pytest.approx(expected, rel=1e-5)


def test_the_probe_refuses_what_it_cannot_measure() -> None:
    model = llama()
    opt = Grass(model, lr=1e-2, active_layers=4)
    with pytest.raises(ValueError, match=r"probe\(\) was given no batch"):
        opt.probe([])
    model(**batch(0)).loss.backward()
    with pytest.raises(
        ValueError, match=r"probe\(\) found gradients of an earlier backward pass: call opt.zero_grad\(\)"
    ):
        opt.probe([batch(0)])
    opt.zero_grad()
    with pytest.raises(
        ValueError, match="probing: the gradient norm of layer 0 is nan; check the loss and the weights"
    ):
        opt.probe([batch(0)], lambda m, b: m(**b).loss * float("nan"))
    assert all(p.grad is None for p in model.parameters())
    # and none of this spoilt it
    opt.probe([batch(0)])
    train(model, opt, 0, 1)
    with pytest.raises(ValueError, match=r"probe\(\) comes before training; this optimizer has made steps already"):
        opt.probe([batch(0)])


def test_a_failing_batch_leaves_no_hook_behind() -> None:
    model = llama()
    opt = Grass(model, lr=1e-2, active_layers=2)
    flags = [p.requires_grad for p in model.parameters()]

    def breaks(model: nn.Module, batch: Any) -> Tensor:
        raise KeyError("labels")

    with pytest.raises(KeyError):
        opt.probe([batch(0)], breaks)
    assert [p.requires_grad for p in model.parameters()] == flags
    model(**batch(0)).loss.backward()
    assert any(p.grad is not None for p in opt.layer_parameters[opt.active[0]])


def test_a_step_before_the_probe_is_refused() -> None:
    model = llama()
    opt = Grass(model, lr=1e-2, active_layers=2)
    model(**batch(0)).loss.backward()
    with pytest.raises(
        RuntimeError, match=r"call opt.probe\(batches\) before the first step, or choose sampler='uniform'"
    ):
        opt.step()


# ---------------------------------------------------------------- options and warnings


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"active_layers": 0}, "active_layers must be from 1 to 4 (the model's layers), not 0"),
        ({"active_layers": 5}, "active_layers must be from 1 to 4 (the model's layers), not 5"),
        ({"sample_every": 0}, "sample_every must be at least 1, not 0"),
        ({"refresh_every": 4}, "refresh_every must be a multiple of sample_every (3), not 4"),
        ({"refresh_every": 0}, "refresh_every must be a multiple of sample_every (3), not 0"),
        ({"temperature": 0.0}, "temperature must be above 0, not 0.0"),
        ({"temperature": math.nan}, "temperature must be above 0, not nan"),
        ({"ema": 1.1}, "ema must be from 0 to 1, not 1.1"),
        ({"norm": "median"}, "norm must be one of none, mean, sum, max, zscore, not 'median'"),
        ({"sampler": "importnace"}, "sampler must be one of importance, static, uniform, not 'importnace'"),
        ({"state": "drop"}, "state must be one of keep, reset, not 'drop'"),
    ],
)
def test_a_bad_option_is_named_in_one_sentence_with_the_model_untouched(options: dict[str, Any], said: str) -> None:
    model = llama()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError) as caught:
        Grass(model, **{"lr": 1e-2, "active_layers": 2, "sample_every": 3, **options})
    assert str(caught.value) == said
    assert [p.requires_grad for p in model.parameters()] == flags


def test_an_importance_that_says_nothing_is_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"GRASS is near uniform: 4\.00 of 4 layers effective.* lower `temperature`"):
        grass_of(llama(), temperature=100.0)


def test_a_collapsed_importance_is_a_warning() -> None:
    model = llama()
    with torch.no_grad():  # one layer whose gradients dwarf the others'
        for p in model.model.layers[2].parameters():
            p.mul_(1e-3)
    match = r"GRASS has collapsed: 1\.\d\d effective layers.*2 active.* raise `temperature`"
    with pytest.warns(UserWarning, match=match):
        grass_of(model, temperature=0.05)


def test_a_healthy_importance_and_a_uniform_sampler_are_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grass_of(llama(), sampler="uniform")
        opt = grass_of(llama(layers=4), active_layers=1, temperature=0.15)
    assert 2 < opt.effective_layers < 0.95 * 4


# ---------------------------------------------------------------- finding the layers


def built(name: str) -> Any:
    import transformers as t

    small = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        if name == "llama":
            return llama(layers=3)
        if name == "llama-tied":
            return llama(layers=3, tied=True)
        if name == "gpt2":
            return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=3, n_head=2))
        if name == "gemma":
            config = t.GemmaConfig(**small, num_hidden_layers=3, num_key_value_heads=1, head_dim=8)
            return t.GemmaForCausalLM(config)
        if name == "gpt-neox":
            return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**small, num_hidden_layers=3, max_position_embeddings=16))
        assert name == "mixtral"
        config = t.MixtralConfig(
            **small, num_hidden_layers=3, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2
        )
        return t.MixtralForCausalLM(config)


FOUND = {
    "llama": ("model.layers", ["model.embed_tokens"], ["model.norm"], ["lm_head"]),
    "llama-tied": ("model.layers", ["model.embed_tokens"], ["model.norm"], []),
    "gpt2": ("transformer.h", ["transformer.wte", "transformer.wpe"], ["transformer.ln_f"], []),
    "gemma": ("model.layers", ["model.embed_tokens"], ["model.norm"], []),
    "gpt-neox": ("gpt_neox.layers", ["gpt_neox.embed_in"], ["gpt_neox.final_layer_norm"], ["lm_head"]),
    "mixtral": ("model.layers", ["model.embed_tokens"], ["model.norm"], ["lm_head"]),
}


def assert_every_parameter_is_in_one_place(model: nn.Module, found: LayerMap) -> None:
    placed = [id(p) for parameters in found.layer_parameters() for p in parameters]
    placed += [id(p) for key in OUTSIDE for p in found.outside[key]]
    assert len(placed) == len(set(placed))
    assert set(placed) == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("name", FOUND)
def test_the_decoder_layers_of_a_causal_model_are_found(name: str) -> None:
    model = built(name)
    found = find_layers(model)
    stack, embedding, final_norm, head = FOUND[name]
    assert (found.name, len(found.layers)) == (stack, 3)
    assert list(found.layers) == list(model.get_submodule(stack))
    for key, modules in (("embedding", embedding), ("final_norm", final_norm), ("head", head)):
        wanted = [id(p) for module in modules for p in model.get_submodule(module).parameters()]
        assert [id(p) for p in found.outside[key]] == wanted, key
    assert_every_parameter_is_in_one_place(model, found)


@pytest.mark.parametrize("name", FOUND)
def test_grass_puts_every_parameter_in_one_group_and_trains(name: str) -> None:
    model = built(name)
    opt = grass_of(model, active_layers=1)
    grouped = [id(p) for group in opt.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters()}
    before = weights(model)
    train(model, opt, 0, 1)
    assert not same(before, weights(model))


def test_an_encoder_decoder_is_ambiguous_and_both_stacks_are_named() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    with pytest.raises(ValueError) as caught:
        find_layers(model)
    said = str(caught.value)
    assert said.startswith("more than one stack could be the decoder (")
    assert "encoder.block (2 x T5Block, " in said
    assert "decoder.block (2 x T5Block, " in said
    assert said.endswith("): pass layers=list(model.<name>)")
    assert len(find_layers(model, layers=list(model.decoder.block)).layers) == 2


def test_the_experts_of_a_layer_are_no_stack_of_their_own() -> None:
    # Mixtral's experts were such a list once, and in other libraries they still are
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 3)
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Mixture() for _ in range(3))

    found = find_layers(Stack())
    assert (found.name, len(found.layers)) == ("blocks", 3)


class Plain(nn.Module):
    """No Hugging Face model: blocks under names of their own, an embedding before and a head after them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8, 4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 8)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.out(self.second(torch.tanh(self.first(self.words(ids)))))
        return logits


def test_any_module_trains_with_the_layers_given_by_hand() -> None:
    torch.manual_seed(0)
    model = Plain()
    with pytest.raises(ValueError, match=r"no stack of decoder layers .* in this model: pass layers=\[...\]"):
        find_layers(model)
    with pytest.raises(ValueError, match="layers: the given list is empty"):
        find_layers(model, layers=[])
    found = find_layers(model, layers=[model.first, model.second])
    assert_every_parameter_is_in_one_place(model, found)
    opt = Grass(model, lr=0.1, active_layers=1, sample_every=2, layers=[model.first, model.second])
    ids = torch.arange(8)

    def loss(module: nn.Module, ids: Tensor) -> Tensor:
        return nn.functional.cross_entropy(module(ids), ids)

    opt.probe([ids], loss)
    start = float(loss(model, ids).detach())
    for _ in range(20):
        loss(model, ids).backward()
        opt.step()
        opt.zero_grad()
    assert float(loss(model, ids).detach()) < 0.5 * start


@settings(max_examples=20, deadline=None)
@given(active=st.integers(1, 4), period=st.integers(1, 4), seed=st.integers(0, 1000))
def test_any_valid_options_train_exactly_the_drawn_layers(active: int, period: int, seed: int) -> None:
    model = llama()
    opt = Grass(model, lr=1e-2, active_layers=active, sample_every=period, sampler="uniform", seed=seed)
    for step in range(5):
        drawn, before = opt.active, [layer_weights(opt, i) for i in range(4)]
        assert len(drawn) == active
        train(model, opt, step, step + 1)
        moved = tuple(
            i
            for i in range(4)
            if not all(torch.equal(p, b) for p, b in zip(opt.layer_parameters[i], before[i], strict=True))
        )
        assert moved == drawn
        assert (opt.active == drawn) or (step + 1) % period == 0
