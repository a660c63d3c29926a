"""Verdicts on a paper's claims: right on made-up runs whose truth is known, and no more said than a protocol allows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reporting_data as data
from harness.reporting.frames import Frames
from harness.reporting.published import load_published
from harness.reporting.published_claims import (
    Claims,
    Comparison,
    Elsewhere,
    Order,
    Spread,
    items_needed,
    load_claims,
    seeds_needed,
)
from harness.reporting.stats import seed_difference
from harness.reporting.verdict_table import Verdict, verdict_table, verdicts
from harness.study.config import load_study
from harness.study.strict_yaml import ConfigError
from house import ROOT

SHIPPED = ROOT / "config" / "published" / "grass-claims.yaml"
BOTH = ("two-step", "three-step")
SAID: dict[str, Any] = {
    "says": "it is so", "table": "Table 2", "source": "Q", "tier": "secondary", "protocol_match": "exact",
    "task": "arithmetic",
}  # fmt: skip
ABOVE = Comparison(
    **SAID, kind="difference", suites=BOTH, method="grass", against="lora", points={data.MODEL: 4.0}, expects="above",
    margin=0,
)  # fmt: skip


def judged(claim: Any, frames: Frames, **changed: Any) -> Verdict:
    claims = Claims(
        title="A paper", protocol="as theirs", sources={"Q": "a summary"}, seed_sd=0.7, disagreement=0.25,
        claims={"one": claim.model_copy(update=changed)},
    )  # fmt: skip
    (found,) = verdicts(frames, claims, None)
    return found


@pytest.fixture(scope="module")
def frames() -> Frames:
    return data.frames()


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "holds"),
        ({"method": "lora", "against": "grass"}, "does not hold"),
        ({"expects": "below"}, "does not hold"),
        ({"expects": "below", "method": "lora", "against": "grass"}, "holds"),
        ({"margin": 60}, "does not hold"),
        ({"method": "lora", "against": "grass", "expects": "at least", "margin": 60}, "holds"),
    ],
)
def test_a_difference_is_judged_by_its_interval(changed: dict[str, Any], verdict: str, frames: Frames) -> None:
    """GRASS was made some twenty points better than LoRA."""
    assert judged(ABOVE, frames, **changed).verdict == verdict


def test_what_the_interval_leaves_open_is_told_with_what_would_have_shown(frames: Frames) -> None:
    found = judged(ABOVE, frames, against="full", suites=BOTH[:1])
    assert found.verdict.startswith("cannot tell (")
    assert found.verdict.endswith(" points would have shown)")


def test_without_runs_or_seeds_nothing_is_told(frames: Frames) -> None:
    assert judged(ABOVE, frames, against="absent").verdict == "cannot tell (no runs of grass and absent to compare)"
    two = replace(frames, runs=frames.runs[frames.runs["seed"] < 2])
    assert judged(ABOVE, two).verdict == "cannot tell (2 seeds in common, 3 are needed)"


@pytest.mark.parametrize("match", ["proxy", "unknown"])
def test_only_an_exact_protocol_contradicts_the_paper(match: str, frames: Frames) -> None:
    seen, unseen = (judged(ABOVE, frames, protocol_match=match, **c).verdict for c in ({}, {"expects": "below"}))
    assert seen.endswith(": seen as claimed")
    assert unseen.endswith(": not seen as claimed")


def test_a_stand_in_gets_no_verdict(frames: Frames) -> None:
    paper = load_published(ROOT / "config/published/grass.yaml").model_copy(
        update={"parameters": {data.MODEL: 1_100_048_384}}
    )
    claims = load_claims(SHIPPED).model_copy(update={"claims": {"one": ABOVE}})
    (found,) = verdicts(frames, claims, paper)
    assert found.verdict == "no verdict (stand-in: 3.4 M parameters, the paper's has 1,100 M)"
    (right,) = verdicts(frames, claims, paper.model_copy(update={"parameters": {data.MODEL: 3_400_000}}))
    assert right.verdict == "holds"


def test_memory_is_judged_in_order(frames: Frames) -> None:
    peaks = {"lora": 19.97, "lisa": 22.3, "full": 51.3}
    runs = frames.runs.copy()
    runs["nvml_process_peak_bytes"] = (runs["method"].map(peaks) * 2**30).astype("Float64").round().astype("Int64")
    known = replace(frames, runs=runs)
    order = Order(
        **SAID, kind="order", model=data.MODEL, methods=("lora", "lisa", "full"), gigabytes=(19.97, 22.3, 51.3),
        margin=0.02,
    )  # fmt: skip
    assert judged(order, known).verdict == "holds"
    assert judged(order, known, methods=("lisa", "lora", "full")).verdict == "does not hold"
    assert judged(order, known, margin=0.2).verdict == "cannot tell (lora and lisa are within 20 %)"
    assert judged(order, frames).verdict == "cannot tell (no device memory of lora, lisa, full)"


def test_a_spread_is_judged_against_its_ratio(frames: Frames) -> None:
    spread = Spread(**SAID, kind="spread", suites=BOTH, method="grass", points={data.MODEL: 50.0}, ratio=1.5, seeds=3)
    assert judged(spread, frames).verdict == "holds"
    assert judged(spread, frames, points={data.MODEL: 0.001}).verdict == "does not hold"
    assert judged(spread, frames, seeds=9).verdict == "cannot tell (3 seeds, 9 are needed)"


def test_the_shipped_claims_are_those_of_the_fact_sheet_and_contradict_nothing(frames: Frames) -> None:
    claims = load_claims(SHIPPED)
    assert len(claims.claims) == 16 + 2
    assert all(claim.protocol_match != "exact" for claim in claims.claims.values())
    table = verdict_table(frames, claims, None)
    assert not table.display["verdict"].str.contains("does not hold|^holds").any()
    assert sum(claims.protocol in note for note in table.footnotes) == 1
    paper = load_study(ROOT / "config/paper.yaml", inputs_needed=False)
    for label, claim in claims.claims.items():
        if isinstance(claim, Comparison | Spread):
            assert set(claim.points) <= paper.models.keys(), label
            assert set(claim.suites) <= paper.tasks[claim.task].suites.keys(), label
            assert claim.method in paper.methods, label
        elif isinstance(claim, Elsewhere):
            assert claim.study == "config/ablation.yaml" or Path(ROOT / claim.study).is_file(), label


def test_the_claimed_differences_are_those_of_the_published_averages() -> None:
    published, claims = load_published(ROOT / "config/published/grass.yaml"), load_claims(SHIPPED)
    checked = 0
    for label, claim in claims.claims.items():
        if isinstance(claim, Comparison):
            for model, points in claim.points.items():
                both = [
                    published.beside(
                        table=claim.table, metric="accuracy", model=model, task=claim.task, method=method,
                        suites=claim.suites,
                    )
                    for method in (claim.method, claim.against)
                ]  # fmt: skip
                assert both[0] is not None, label
                assert both[1] is not None, label
                assert both[0].value - both[1].value == pytest.approx(points, abs=0.005), (label, model)
                checked += 1
    assert checked == 21


def test_as_many_seeds_as_are_needed_show_it_in_four_of_five_cases() -> None:
    rng, points, sd = np.random.default_rng(1), 1.0, 0.7
    seeds = seeds_needed(points, sd)
    assert seeds is not None
    shown = [
        seed_difference(
            dict(enumerate(rng.normal(points, sd, seeds))), dict(enumerate(rng.normal(0, sd, seeds)))
        ).p
        for _ in range(2000)
    ]  # fmt: skip
    power = float(np.mean([p is not None and p < 0.05 for p in shown]))
    assert 0.78 < power < 0.9
    assert seeds_needed(0.01, sd) is None
    assert seeds_needed(0.0, sd) is None


def test_as_many_items_as_are_needed_show_it_in_four_of_five_cases() -> None:
    rng, points, disagreement = np.random.default_rng(2), 3.0, 0.25
    items = items_needed(points, disagreement)
    assert items is not None
    share = points / 100
    chances = [(disagreement + share) / 2, (disagreement - share) / 2, 1 - disagreement]
    drawn = rng.multinomial(items, chances, size=2000)
    z = (drawn[:, 0] - drawn[:, 1]) / np.sqrt(drawn[:, 0] + drawn[:, 1])
    assert float(np.mean(np.abs(z) > 1.96)) == pytest.approx(0.8, abs=0.03)
    assert items_needed(0.0, disagreement) is None


@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("source: B", "source: Z", "claims.overlap-is-faster.source: unknown source Z"),
        ("gigabytes: [11.26, 11.64, 12.45]", "gigabytes: [11.26]", "one number a method, in the same order"),
        ("expects: below", "expects: under", "expects"),
    ],
)
def test_a_mistake_in_a_file_of_claims_is_named(right: str, wrong: str, said: str, tmp_path: Path) -> None:
    text = SHIPPED.read_text(encoding="utf-8")
    assert right in text
    (tmp_path / "claims.yaml").write_text(text.replace(right, wrong, 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"claims\.yaml") as refused:
        load_claims(tmp_path / "claims.yaml")
    assert said in str(refused.value)
