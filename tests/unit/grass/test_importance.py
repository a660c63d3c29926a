"""Importance, probabilities and draws as laws: each true for all inputs, or exact by hand."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grass.importance import Importance, Norm, effective_layers, normalise, probabilities
from grass.sampling import draw_layers

# gradient norms as they occur: any scale, zero included
NORM = st.one_of(st.just(0.0), st.floats(1e-12, 1e6))
NORMS = st.lists(NORM, min_size=1, max_size=12)
TEMPERATURE = st.floats(0.05, 50)
SCALINGS: tuple[Norm, ...] = ("none", "mean", "sum", "max", "zscore")


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
