"""Statistics of importance on simulated batches, of which the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from further import a_few
from harness.reporting import importance_stats
from harness.reporting.importance_stats import (
    between_halves,
    effective_numbers,
    estimate,
    halves,
    moved_share,
    rank_correlations,
    relative_means,
    resampled,
    same_order_p,
    sampling_probabilities,
    temperatures_for,
)
from harness.reporting.probed import SAMPLERS, OfTask, compared
from harness.reporting.stats import Array
from scipy.stats import spearmanr

from grass.importance import effective_layers, probabilities, temperature_for

LAYERS, BATCHES = 30, 24


def simulated(truth: Array, seed: int, *, noise: float = 0.3, scale: float = 1.0) -> Array:
    """Batches of one task: each has a size of its own, and every layer noise of its own."""
    rng = np.random.default_rng(seed)
    size = 0.3 * rng.standard_normal((BATCHES, 1))
    return scale * truth * np.exp(size + noise * rng.standard_normal((BATCHES, len(truth))))


def truth(seed: int, layers: int = LAYERS) -> Array:
    return np.asarray(np.exp(0.4 * np.random.default_rng([7, seed]).standard_normal(layers)))


def of_task(norms: Array) -> OfTask:
    one, other = halves(norms)
    return OfTask(
        norms=norms,
        halves=float(rank_correlations(one, other).mean()),
        halves_moved=dict.fromkeys((s.key for s in SAMPLERS), 0.0),
    )


# ---------------------------------------------------------------- does it claim what is there, and nothing else?


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance_stats, "PERMUTATIONS", 399)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("noise_a", "noise_b"), a_few([(0.1, 0.1), (0.1, 0.5), (0.5, 0.5)], one_in=2))
def test_the_same_order_is_called_different_in_a_twentieth_of_cases(noise_a: float, noise_b: float) -> None:
    """Another scale, other noise: neither is another order. Of 100 cases 5 are expected, 12 have a chance of 1e-3."""
    p = [
        same_order_p(
            simulated(truth(k), 2 * k, noise=noise_a), simulated(truth(k), 2 * k + 1, noise=noise_b, scale=5.0)
        )
        for k in range(100)
    ]
    assert sum(value < 0.05 for value in p) < 12
    # and not because it never rejects: p values of a true hypothesis are spread evenly
    assert 0.3 < np.mean(p) < 0.7


@pytest.mark.usefixtures("quick")
def test_another_order_is_found() -> None:
    p = [
        same_order_p(simulated(truth(k), 2 * k), simulated(truth(k) * truth(1000 + k) ** 0.75, 2 * k + 1))
        for k in range(20)
    ]
    assert all(value < 0.05 for value in p)


def test_among_four_tasks_the_one_that_differs_is_found_and_no_other() -> None:
    same = truth(1)
    norms = {name: simulated(same, seed) for seed, name in enumerate(("a", "b", "c"))}
    tasks = {name: of_task(values) for name, values in {**norms, "odd": simulated(same[::-1], 9)}.items()}
    verdicts = {(pair.first, pair.second): pair.verdict for pair in compared(tasks)}
    assert {pair for pair, verdict in verdicts.items() if verdict == "differ"} == {
        (name, "odd") for name in ("a", "b", "c")
    }
    # 24 batches of this noise leave no doubt that a, b and c are alike
    assert {verdict for pair, verdict in verdicts.items() if "odd" not in pair} <= {"alike", "cannot tell"}


def test_the_ceiling_is_what_equal_tasks_reach_and_others_do_not() -> None:
    a, b, odd = simulated(truth(1), 1), simulated(truth(1), 2), simulated(truth(1)[::-1], 3)
    one, other = halves(a)
    ceiling = float(rank_correlations(one, other).mean())
    assert between_halves(a, b, rank_correlations) == pytest.approx(ceiling, abs=0.03)
    assert between_halves(a, odd, rank_correlations) < ceiling - 0.5


@pytest.mark.parametrize(("shift", "noise"), a_few([(0.0, 0.3), (0.2, 0.1), (0.2, 0.5), (0.6, 0.2)], one_in=2))
def test_intervals_hold_the_true_rank_correlation(shift: float, noise: float) -> None:
    """95 % are meant; below 80 of 100 would be below the 89 % that the page of the function admits."""
    held = 0
    for k in range(100):
        first, second = truth(k), truth(k) * np.exp(shift / 0.4 * np.log(truth(5000 + k)))
        a, b = simulated(first, 2 * k, noise=noise), simulated(second, 2 * k + 1, noise=noise)
        rho = float(rank_correlations(a.mean(axis=0), b.mean(axis=0)))
        found = estimate(rho, rank_correlations(resampled(a, 0), resampled(b, 1)), least=-1.0, most=1.0)
        assert found.low <= found.value <= found.high
        held += found.low <= float(rank_correlations(first, second)) <= found.high
    assert held >= 80


# ---------------------------------------------------------------- arithmetic


def test_probabilities_and_effective_layers_are_those_of_the_library() -> None:
    means = [float(v) for v in simulated(truth(3), 3).mean(axis=0)]
    relative = np.asarray(means) / np.mean(means)
    for tau in (1.0, 0.25):
        expected = probabilities(means, temperature=tau, norm="mean")
        found = sampling_probabilities(relative, tau)
        assert found == pytest.approx(expected)
        assert float(effective_numbers(found)) == pytest.approx(effective_layers(expected))


def test_a_found_temperature_gives_the_share_whatever_the_profile() -> None:
    relative = relative_means(np.stack([simulated(truth(k), k)[None] for k in range(5)])[:, 0])
    for share in (0.3, 0.7, 0.95):
        tau = temperatures_for(relative, share)
        assert effective_numbers(sampling_probabilities(relative, tau[:, None])) == pytest.approx(share * LAYERS)
        own = [temperature_for(list(map(float, r)), effective=share * LAYERS, norm="mean") for r in relative]
        assert tau.tolist() == pytest.approx(own)
    two_on_top = np.array([2.0, 2.0, 1.0, 0.0])
    assert sampling_probabilities(two_on_top, temperatures_for(two_on_top, 0.3)) == pytest.approx([0.5, 0.5, 0, 0])


def test_rank_correlation_is_scipys_also_with_ties() -> None:
    rng = np.random.default_rng(4)
    first, second = rng.integers(0, 6, (5, 12)).astype(float), rng.standard_normal((5, 12))
    expected = [float(spearmanr(a, b).statistic) for a, b in zip(first, second, strict=True)]
    assert rank_correlations(first, second).tolist() == pytest.approx(expected)
    assert rank_correlations(np.ones(4), np.arange(4.0)) == 0


def test_moved_share_of_known_samplers() -> None:
    first = np.array([0.5, 0.5, 0.0])
    assert float(moved_share(first, first)) == 0
    assert float(moved_share(first, np.array([0.5, 0.0, 0.5]))) == pytest.approx(0.5)
    assert float(moved_share(first, np.array([0.0, 0.0, 1.0]))) == pytest.approx(1.0)


def test_halves_share_no_batch() -> None:
    """Batch k is large in layer k alone, so a half's means say which batches are in it."""
    norms = np.ones((6, 6)) + 10 * np.eye(6)
    for one, other in zip(*halves(norms), strict=True):
        assert set(np.flatnonzero(one > 1)) | set(np.flatnonzero(other > 1)) == set(range(6))
        assert not set(np.flatnonzero(one > 1)) & set(np.flatnonzero(other > 1))
    one, other = halves(norms, 2)
    assert int((one[0] > 1).sum()) == 2
    with pytest.raises(ValueError, match="two sets of 4 batches"):
        halves(norms, 4)


def test_a_batch_weighs_by_its_norms_as_in_the_library() -> None:
    norms = np.array([[1.0, 3.0], [20.0, 10.0]])
    assert relative_means(norms).tolist() == pytest.approx([10.5 / 8.5, 6.5 / 8.5])
