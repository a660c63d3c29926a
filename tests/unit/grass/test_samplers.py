"""Every sampler's law, and the runs that must come out alike whichever way they are asked for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from grass_tiny import batch, grass_of, llama, same, straight_and_resumed, train, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from grass import Grass
from grass.sampling import LayerSampler, Sampler

CHI2_7_ONCE_IN_TEN_THOUSAND = 29.9


def sampler(kind: Sampler, *, layers: int = 8, active: int = 2, seed: int = 0) -> LayerSampler:
    return LayerSampler(kind, layers=layers, active_layers=active, seed=seed)


def draws(chosen: LayerSampler, count: int, *, period: int = 10) -> list[tuple[int, ...]]:
    drawn: list[tuple[int, ...]] = []
    for number in range(count):
        drawn.append(chosen.draw(steps=number * period, trained=drawn[-1] if drawn else ()))
    return drawn


def inclusions(drawn: list[tuple[int, ...]], layers: int = 8) -> list[int]:
    counted = Counter(layer for active in drawn for layer in active)
    return [counted[layer] for layer in range(layers)]


def chi2_of_uniform(counts: list[int]) -> float:
    mean = sum(counts) / len(counts)
    return sum((c - mean) ** 2 / mean for c in counts)


def test_uniform_has_lisas_law() -> None:
    assert chi2_of_uniform(inclusions(draws(sampler("uniform"), 4000))) < CHI2_7_ONCE_IN_TEN_THOUSAND


def test_importance_at_infinite_temperature_has_lisas_law() -> None:
    chosen = sampler("importance")
    chosen.follow([1.0, 9.0, 2.0, 7.0, 3.0, 1.0, 0.5, 4.0], temperature=1e12, norm="mean")
    assert chi2_of_uniform(inclusions(draws(chosen, 4000))) < CHI2_7_ONCE_IN_TEN_THOUSAND


def test_importance_draws_one_layer_as_often_as_its_probability_says() -> None:
    chosen = sampler("importance", active=1)
    chosen.follow([1.0, 3.0, 2.0, 2.5, 1.5, 1.0, 0.5, 2.0], temperature=0.7, norm="mean")
    counts = inclusions(draws(chosen, 4000))
    chi2 = sum((c - 4000 * p) ** 2 / (4000 * p) for c, p in zip(counts, chosen.probability, strict=True))
    assert chi2 < CHI2_7_ONCE_IN_TEN_THOUSAND
    # and the probabilities are far from uniform, else this would say nothing
    assert max(chosen.probability) > 2.5 * min(chosen.probability)


def test_inverse_turns_the_order_of_the_probabilities_round() -> None:
    values = [1.0, 3.0, 2.0, 2.5]
    plain, inverse = sampler("importance", layers=4), sampler("inverse", layers=4)
    plain.follow(values, temperature=0.7, norm="mean")
    inverse.follow(values, temperature=0.7, norm="mean")
    products = [p * q for p, q in zip(plain.probability, inverse.probability, strict=True)]
    # softmax(x) and softmax(-x) multiply to a constant
    assert products == pytest.approx([products[0]] * 4)
    assert inverse.probability.index(max(inverse.probability)) == 0


def test_topk_takes_the_largest_whatever_the_seed() -> None:
    values = [1.0, 3.0, 2.0, 2.5]
    for seed in range(20):
        chosen = sampler("topk", layers=4, seed=seed)
        chosen.follow(values, temperature=1.0, norm="mean")
        assert set(draws(chosen, 5)) == {(1, 3)}
    assert chosen.probability == [0.0, 0.5, 0.0, 0.5]
    chosen.follow([5.0, 3.0, 2.0, 2.5], temperature=1.0, norm="mean")
    assert draws(chosen, 1) == [(0, 1)]


def test_fixed_draws_one_set_and_stays_with_it() -> None:
    sets = set()
    for seed in range(30):
        drawn = draws(sampler("fixed", seed=seed), 6)
        assert len(set(drawn)) == 1
        sets.add(drawn[0])
    # which set it is differs by seed
    assert len(sets) > 10


def test_static_never_follows_what_training_shows() -> None:
    model = llama()
    opt = grass_of(model, sampler="static", temperature=0.2)
    before = list(opt.probability)
    train(model, opt, 0, 9)
    assert opt.probability == before
    assert opt.importance is not None
    assert opt.age_steps == (9,) * 4


def test_age_favours_what_has_slept_longest() -> None:
    chosen = sampler("age", layers=4, active=1)
    assert chosen.draw(steps=0, trained=()) in {(0,), (1,), (2,), (3,)}
    chosen.draw(steps=10, trained=(0,))
    assert chosen.probability == pytest.approx([1 / 34, 11 / 34, 11 / 34, 11 / 34])
    chosen.draw(steps=20, trained=(1,))
    assert chosen.probability == pytest.approx([11 / 54, 1 / 54, 21 / 54, 21 / 54])
    assert chi2_of_uniform(inclusions(draws(sampler("age"), 4000))) < CHI2_7_ONCE_IN_TEN_THOUSAND


@settings(max_examples=60, deadline=None)
@given(layers=st.integers(1, 9), data=st.data(), seed=st.integers(0, 2**31))
def test_cyclic_trains_every_layer_once_a_round(layers: int, data: st.DataObject, seed: int) -> None:
    active = data.draw(st.integers(1, layers))
    rounds = 6
    drawn = draws(sampler("cyclic", layers=layers, active=active, seed=seed), rounds * layers)
    assert all(len(set(chosen)) == active for chosen in drawn)
    # after any number of draws no layer is more than one visit ahead of another, but for the round under way
    for done in range(1, len(drawn) + 1):
        counts = inclusions(drawn[:done], layers)
        assert max(counts) - min(counts) <= 2
    assert inclusions(drawn, layers) == [rounds * active] * layers


def test_cyclic_is_shuffled_anew_in_every_round() -> None:
    drawn = draws(sampler("cyclic", active=8 // 4), 40)
    rounds = {tuple(drawn[i : i + 4]) for i in range(0, 40, 4)}
    assert len(rounds) > 5


@pytest.mark.parametrize("kind", ["importance", "uniform", "inverse", "topk", "fixed", "static", "age", "cyclic"])
def test_every_sampler_trains_resumes_and_repeats_bit_for_bit(kind: Any, tmp_path: Path) -> None:
    opt, after = straight_and_resumed(5, tmp_path / "state.pt", sampler=kind, temperature=0.3)
    assert (after.active, after.probability) == (opt.active, opt.probability)


def test_uniform_is_lisa_with_kept_state_bit_for_bit() -> None:
    """LISA by hand: AdamW over everything, gradients only where drawn, moments never dropped (LMFlow's behaviour)."""
    mine, theirs = llama(), llama()
    opt = Grass(mine, lr=1e-2, active_layers=2, sample_every=3, sampler="uniform", seed=5)
    lisa = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    generator = torch.Generator().manual_seed(5)
    from grass.sampling import draw_layers

    for step in range(12):
        if step % 3 == 0:
            active = draw_layers([0.25] * 4, 2, generator)
            for number, layer in enumerate(theirs.model.layers):
                layer.requires_grad_(number in active)
        assert opt.active == active
        train(mine, opt, step, step + 1)
        theirs(**batch(step)).loss.backward()
        lisa.step()
        lisa.zero_grad()
    assert same(weights(mine), weights(theirs))
