"""`temperature="auto"`: laws of the temperature that gives a wanted effective number of layers, and its way through
training, records and resumes.
"""

from __future__ import annotations

import math
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from further import a_few
from grass_tiny import batch, grass_of, llama, same, straight_and_resumed, train, weights
from hypothesis import assume, given
from hypothesis import strategies as st

from grass import Grass, Options, read_history, write_history
from grass.belief import Belief
from grass.importance import SAME, Norm, effective_layers, probabilities, temperature_for

# as measured on real models, norms lie within a factor of 7; tested up to far beyond
SPREADS = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=80)
SHARES = st.floats(0.05, 0.99)
SCALINGS: tuple[Norm, ...] = ("none", "mean", "sum", "max", "zscore")


def tell_apart(values: list[float]) -> bool:
    """Whether no two values are near ties at the top, so that few effective layers can be had too."""
    first, second = sorted(values)[:-3:-1]
    return first - second > 10 * SAME * first


def solved(values: list[float], effective: float, norm: Norm = "mean", **options: Any) -> list[float]:
    tau = temperature_for(values, effective=effective, norm=norm, **options)
    return probabilities(values, temperature=-tau if options.get("inverse") else tau, norm=norm)


# ------------------------------------------------------------ laws


@given(values=SPREADS, share=SHARES, norm=st.sampled_from(SCALINGS))
def test_the_effective_number_is_the_wanted_one(values: list[float], share: float, norm: Norm) -> None:
    assume(tell_apart(values))
    wanted = max(1.001, share * len(values))
    assert effective_layers(solved(values, wanted, norm)) == pytest.approx(wanted, rel=1e-6)


@given(values=SPREADS, share=SHARES)
def test_inverse_draws_reach_the_wanted_number_too(values: list[float], share: float) -> None:
    low, second = sorted(values)[:2]
    assume(second - low > 10 * SAME * max(values))
    wanted = max(1.001, share * len(values))
    p = solved(values, wanted, inverse=True)
    assert effective_layers(p) == pytest.approx(wanted, rel=1e-6)
    assert p[values.index(low)] == max(p)


@given(values=SPREADS, share=SHARES, factor=st.floats(1e-8, 1e8), norm=st.sampled_from(SCALINGS))
def test_the_unit_of_the_gradients_does_not_matter(
    values: list[float], share: float, factor: float, norm: Norm
) -> None:
    assume(tell_apart(values))
    wanted = max(1.001, share * len(values))
    scaled = solved([v * factor for v in values], wanted, norm)
    assert scaled == pytest.approx(solved(values, wanted, norm), rel=1e-5, abs=1e-9)


@given(values=SPREADS, share=SHARES)
def test_the_scaling_of_the_norms_does_not_matter(values: list[float], share: float) -> None:
    assume(tell_apart(values))
    wanted = max(1.001, share * len(values))
    by_mean = solved(values, wanted)
    for norm in SCALINGS:
        assert solved(values, wanted, norm) == pytest.approx(by_mean, rel=1e-5, abs=1e-9)


@given(values=SPREADS, share=SHARES, seed=st.integers(0, 9))
def test_the_order_of_the_layers_does_not_matter(values: list[float], share: float, seed: int) -> None:
    assume(tell_apart(values))
    order = random.Random(seed).sample(range(len(values)), len(values))
    p, q = solved(values, share * len(values)), solved([values[i] for i in order], share * len(values))
    assert q == pytest.approx([p[i] for i in order], rel=1e-6, abs=1e-12)


@given(values=SPREADS, shares=st.tuples(SHARES, SHARES))
def test_a_larger_target_gives_a_higher_temperature_and_more_layers(
    values: list[float], shares: tuple[float, float]
) -> None:
    low, high = (share * len(values) for share in sorted(shares))
    few, many = (temperature_for(values, effective=wanted, norm="mean") for wanted in (low, high))
    assert few <= many
    assert effective_layers(solved(values, low)) <= effective_layers(solved(values, high)) * (1 + 1e-9)


@given(values=SPREADS, active=st.integers(1, 8), target=SHARES)
def test_never_fewer_than_one_more_than_are_drawn_and_never_uniform_unasked(
    values: list[float], active: int, target: float
) -> None:
    assume(tell_apart(values))
    layers = len(values)
    belief = Belief(Options(lr=1e-3, active_layers=active, target=target), layers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        belief.start(values)
    assert belief.effective_layers >= min(layers, active + 1) * (1 - 1e-12)
    if target <= 0.95 and active + 1 <= 0.95 * layers:
        assert belief.effective_layers <= 0.95 * layers * (1 + 1e-6)


# ------------------------------------------------------------ ties


def test_equal_norms_are_drawn_uniformly_and_it_is_said() -> None:
    # equal but for the rounding of fp32
    for values in ([0.0] * 6, [2e-5] * 6, [1.0, 1 + 5e-7, 1 - 4e-7, 1.0, 1.0, 1.0]):
        assert temperature_for(values, effective=3.0, norm="mean") == math.inf
        belief = Belief(Options(lr=1e-3, active_layers=2), 6)
        said = r"GRASS is near uniform: 6\.00 of 6 layers effective after probing: all layers have the same mean grad"
        with pytest.warns(UserWarning, match=said):
            belief.start(values)
        assert belief.sampler.probability == [1 / 6] * 6


def test_more_ties_at_the_top_than_wanted_share_everything() -> None:
    p = solved([5.0, 1.0, 5.0, 2.0, 5.0, 5.0], 3.0)
    assert p == pytest.approx([0.25, 0, 0.25, 0, 0.25, 0.25], abs=1e-12)
    assert min(p) > 0
    # fewer ties than wanted: the wanted number, in equal parts among them
    p = solved([5.0, 1.0, 5.0, 2.0, 1.5, 1.0], 3.0)
    assert effective_layers(p) == pytest.approx(3.0, rel=1e-9)
    assert p[0] == p[2] == max(p)


def test_no_layer_more_than_are_drawn_leaves_nothing_to_choose() -> None:
    belief = Belief(Options(lr=1e-3, active_layers=3), 4)
    with pytest.warns(UserWarning, match="lower `active_layers`, which leaves nothing to choose, to change that"):
        belief.start([1.0, 2.0, 3.0, 4.0])
    assert belief.temperature == math.inf


def test_a_target_near_one_is_told_as_such() -> None:
    with pytest.warns(UserWarning, match=r"near uniform: 29\.40 of 30 layers effective .* lower `target`"):
        Belief(Options(lr=1e-3, active_layers=4, target=0.98), 30).start([1.0 + i for i in range(30)])


# ------------------------------------------------------------ in training


def test_by_hand_on_two_layers() -> None:
    """Two layers: p = 1 / (1 + exp(-d / tau)); exp(H) = 1.5 at p = 0.8526..., so tau = d / ln(p / (1 - p))."""
    low, high = 0.5, 1.0
    while high - low > 1e-15:
        p = (low + high) / 2
        entropy = -p * math.log(p) - (1 - p) * math.log(1 - p)
        low, high = (p, high) if entropy > math.log(1.5) else (low, p)
    tau = temperature_for([1.0, 3.0], effective=1.5, norm="mean")  # by their mean, they lie 1 apart
    assert tau == pytest.approx(1 / math.log(p / (1 - p)), rel=1e-9)


@pytest.mark.parametrize("drift", [0.3, 3.0])
def test_the_effective_number_stays_at_the_target_as_norms_fall_and_rise(drift: float) -> None:
    """Where the layers that train change their norms, a fixed temperature would drift to uniformity or collapse."""
    values = [1.0 + layer % 7 / 3 for layer in range(20)]
    found: dict[Any, list[float]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for temperature in ("auto", 0.35):
            belief = Belief(Options(lr=1e-3, active_layers=4, temperature=temperature), 20)
            belief.start(values)
            for period in range(1, 30):
                for layer in belief.sampler.draw(steps=period, trained=()):
                    belief.note({layer: torch.tensor(values[layer] * drift)})
                belief.refresh(steps=period)
                found.setdefault(temperature, []).append(belief.effective_layers)
    assert found["auto"] == pytest.approx([14.0] * 29, rel=1e-6)
    assert max(found[0.35]) / min(found[0.35]) > 1.15


def test_a_run_shows_its_temperature_and_how_many_layers_it_gives(tmp_path: Path) -> None:
    model = llama(layers=6)
    opt = Grass(model, lr=1e-2, active_layers=2, sample_every=3)
    assert opt.temperature is None
    opt.probe([batch(-1), batch(-2)])
    train(model, opt, 0, 7)
    write_history(opt.history, tmp_path / "history.jsonl")
    records = read_history(tmp_path / "history.jsonl")
    # solved for at the probe, after step 3 and after step 6
    assert len({r.temperature for r in records}) == 3
    assert [r.effective_layers for r in records] == pytest.approx([4.2] * 7, rel=1e-6)
    assert records[-1].temperature == opt.temperature


def test_static_keeps_the_temperature_of_the_probe_and_uniform_has_none() -> None:
    model = llama()
    opt = grass_of(model, sampler="static", active_layers=1)
    before = opt.temperature, list(opt.probability)
    train(model, opt, 0, 9)
    assert (opt.temperature, opt.probability) == before
    assert opt.effective_layers == pytest.approx(2.8, rel=1e-6)
    assert grass_of(llama(), sampler="uniform").temperature is None


@pytest.mark.parametrize("stop", a_few([1, 3, 4, 6, 7], one_in=3))
def test_a_resumed_run_ends_as_if_nothing_had_happened(stop: int, tmp_path: Path) -> None:
    opt, after = straight_and_resumed(stop, tmp_path / "state.pt", "temperature", refresh_every=6, active_layers=1)
    assert (after.active, after.probability, after.temperature) == (opt.active, opt.probability, opt.temperature)


def test_a_state_from_before_there_was_auto_goes_on_with_its_number_or_is_refused() -> None:
    options: dict[str, Any] = {"temperature": 1.0, "active_layers": 1}
    straight = llama()
    opt = grass_of(straight, **options)
    train(straight, opt, 0, 4)
    old = opt.state_dict()
    del old["grass"]["belief"]["temperature"]

    again = llama()
    again.load_state_dict(straight.state_dict())
    same_run = Grass(again, lr=1e-2, sample_every=3, **options)
    same_run.load_state_dict(old)
    assert same_run.temperature == 1.0
    train(straight, opt, 4, 9)
    train(again, same_run, 4, 9)
    assert same(weights(straight), weights(again))

    with pytest.raises(ValueError, match="saved by a version without temperature='auto': build Grass with that run's"):
        Grass(llama(), lr=1e-2, active_layers=1, sample_every=3).load_state_dict(old)


def test_a_state_without_a_temperature_goes_on_where_none_is_used() -> None:
    opt = grass_of(llama(), sampler="uniform")
    old = opt.state_dict()
    del old["grass"]["belief"]["temperature"]
    again = grass_of(llama(), sampler="uniform")
    again.load_state_dict(old)
    assert again.temperature is None
