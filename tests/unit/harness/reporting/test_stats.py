"""Means, paired differences, Holm, rank correlation: known cases and, for the intervals, a small simulation."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from harness.reporting.stats import (
    Difference,
    Pairs,
    agreement,
    effective_layers,
    holm,
    judge,
    pair_documents,
    paired_difference,
    rank_correlation,
    summarise,
)


def pairs(first: np.ndarray, second: np.ndarray) -> Pairs:
    return Pairs(first=first.astype(float), second=second.astype(float), weights=np.ones(first.shape[1]))


def noisy(rng: np.random.Generator, skill: float, seeds: int = 3, documents: int = 200) -> np.ndarray:
    return rng.random((seeds, documents)) < skill


def test_summary_uses_the_sample_standard_deviation() -> None:
    summary = summarise([1.0, 2.0, 4.0])
    assert summary.mean == pytest.approx(7 / 3)
    assert summary.sd == pytest.approx(math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2))
    assert summarise([2.0]).sd is None
    assert summarise([]).mean is None


def test_identical_methods_give_no_claim() -> None:
    outcomes = noisy(np.random.default_rng(0), 0.5)
    (judged,) = judge([paired_difference(pairs(outcomes, outcomes))])
    assert judged.mean == 0
    assert judged.verdict.startswith("no claim")


def test_a_clear_difference_is_claimed_with_its_sign() -> None:
    rng = np.random.default_rng(1)
    good, bad = noisy(rng, 0.8), noisy(rng, 0.3)
    assert judge([paired_difference(pairs(good, bad))])[0].verdict == "higher"
    assert judge([paired_difference(pairs(bad, good))])[0].verdict == "lower"


def test_two_seeds_never_make_a_claim() -> None:
    rng = np.random.default_rng(2)
    (judged,) = judge([paired_difference(pairs(noisy(rng, 0.9, seeds=2), noisy(rng, 0.1, seeds=2)))])
    assert judged.verdict == "no claim (2 seeds in common, 3 are needed)"


def test_one_seed_that_disagrees_blocks_the_claim_that_a_bootstrap_over_documents_would_make() -> None:
    rng = np.random.default_rng(3)
    second = noisy(rng, 0.4, documents=500)
    first = np.stack([noisy(rng, p, seeds=1, documents=500)[0] for p in (0.75, 0.75, 0.42)])
    (judged,) = judge([paired_difference(pairs(first, second))])
    assert judged.bootstrap is not None
    assert judged.bootstrap[0] > 0
    assert judged.verdict == "no claim (seed-level t interval covers 0)"


def test_no_spread_between_seeds_is_no_certainty() -> None:
    first, second = np.ones((3, 50)), np.zeros((3, 50))
    (judged,) = judge([paired_difference(pairs(first, second))])
    assert judged.mean == 1
    assert "no spread" in judged.verdict


def test_nothing_in_common() -> None:
    (judged,) = judge([paired_difference(pairs(np.zeros((0, 0)), np.zeros((0, 0))))])
    assert judged == Difference(mean=None, seeds=0, documents=0, verdict=judged.verdict)
    assert judged.verdict.startswith("no claim")


def test_documents_and_seeds_are_paired_and_a_loss_is_weighed_by_tokens() -> None:
    def rows(run: str, losses: dict[int, float | None]) -> list[dict[str, object]]:
        return [
            {"run": run, "suite": "s", "document": d, "correct": True, "loss": v, "tokens": d}
            for d, v in losses.items()
        ]

    table = pd.DataFrame(rows("a0", {1: 1.0, 2: 2.0, 3: None}) + rows("b0", {3: 9.0, 2: 1.0, 1: 3.0}))
    found = pair_documents(table, first={0: "a0", 7: "a7"}, second={0: "b0"}, suite="s", value="loss")
    assert found.first.tolist() == [[1.0, 2.0]]
    assert found.second.tolist() == [[3.0, 1.0]]
    assert paired_difference(found).mean == pytest.approx(((1 - 3) * 1 + (2 - 1) * 2) / 3)


def test_a_document_that_stands_twice_is_refused() -> None:
    row = {"run": "a", "suite": "s", "document": 1, "correct": True, "loss": 1.0, "tokens": 1}
    with pytest.raises(ValueError, match="twice"):
        pair_documents(pd.DataFrame([row, row]), first={0: "a"}, second={0: "a"}, suite="s", value="correct")


def test_false_claims_stay_below_five_percent_and_both_intervals_together_cover() -> None:
    """Two methods of equal skill; documents and seeds both add noise."""
    rng = np.random.default_rng(4)
    claims = covered = 0
    trials = 150
    for _ in range(trials):
        hard = rng.random(60)
        outcomes = []
        for _method in range(2):
            skill = 0.5 + 0.05 * rng.standard_normal((3, 1))  # every run has luck of its own
            outcomes.append(0.6 * hard + 0.4 * rng.random((3, 60)) < skill)
        found = paired_difference(pairs(*outcomes))
        claims += judge([found])[0].verdict in {"higher", "lower"}
        assert found.bootstrap is not None
        ends = [found.bootstrap, *([found.seed_t] if found.seed_t else [])]
        covered += min(low for low, _ in ends) <= 0 <= max(high for _, high in ends)
    assert claims / trials <= 0.06
    assert covered / trials >= 0.94


def test_holm_on_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_effective_layers() -> None:
    assert effective_layers([0.25] * 4) == pytest.approx(4)
    assert effective_layers([1.0, 0.0]) == pytest.approx(1)
    p = [0.5, 0.25, 0.25]
    assert effective_layers(p) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)))


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 400]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 1], [3, 2, 1]) is None


def test_a_belief_holds_until_the_next_one() -> None:
    believed = pd.DataFrame(
        [
            {"step": s, "layer": k, "importance": v}
            for s, vs in ((0, (1, 2, 3)), (10, (3, 2, 1)))
            for k, v in enumerate(vs)
        ]
    )
    observed = pd.DataFrame(
        [{"step": s, "layer": k, "gradient_rms": v} for s in (0, 9, 10) for k, v in enumerate((1, 2, 3))]
    )
    assert agreement(believed, observed)["rho"].tolist() == pytest.approx([1, 1, -1])
