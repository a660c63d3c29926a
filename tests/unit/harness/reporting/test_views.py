"""Tables by their names: numbers recomputed from the rows, the paper's beside them, and what a row rests on."""

from __future__ import annotations

import re
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
import reporting_data as data
from harness.reporting.frames import Frames
from harness.reporting.published import Published
from harness.reporting.stats import Difference, detectable, seed_difference
from harness.reporting.table import Table
from harness.reporting.view_tables import view_table
from harness.study.spec import Study
from harness.study.views import View

BOTH = ("two-step", "three-step")
VIEW: dict[str, Any] = {
    "title": "Table 2, arithmetic", "paper": "Table 2", "task": "arithmetic",
    "methods": ("base", "full", "lora", "lisa", "grass"),
    "columns": {
        "two steps": {"suites": ("two-step",)}, "average": {"suites": BOTH},
        "spread": {"suites": BOTH, "metric": "accuracy_sd"},
    },
}  # fmt: skip
NUMBER: dict[str, Any] = {
    "table": "Table 2", "model": data.MODEL, "task": "arithmetic", "suites": BOTH, "method": "grass",
    "metric": "accuracy", "unit": "percent", "value": 34.22, "source": "Q", "status": "FOUND", "tolerance": 2.3,
    "tolerance_why": "binomial",
}  # fmt: skip


def published(**changed: Any) -> Published:
    return Published(
        title="GRASS", sources={"Q": "a summary"}, tolerances={"binomial": "noise"},
        numbers=(Published.model_fields["numbers"].annotation.__args__[0](**NUMBER | changed),),  # type: ignore[union-attr]
    )  # fmt: skip


def study(**changed: Any) -> Study:
    return data.study().model_copy(update={"views": {"table-2": View.model_validate(VIEW | changed)}})


@pytest.fixture(scope="module")
def frames() -> Frames:
    return data.frames()


@pytest.fixture(scope="module")
def table(frames: Frames) -> Table:
    return view_table(frames, study(), "table-2", published())


def row(table: Table, method: str) -> Any:
    return table.display[table.display["method"].str.startswith(method)].iloc[0]


def accuracies(frames: Frames, method: str, suites: tuple[str, ...]) -> list[float]:
    ok = frames.ok_scores()
    mine = ok[(ok["method"] == method) & (ok["task"] == "arithmetic") & ok["suite"].isin(suites)]
    return [100 * float(of_run["accuracy"].mean()) for _, of_run in mine.groupby("run")]


def test_a_cell_is_the_mean_over_seeds_of_the_mean_over_suites(frames: Frames, table: Table) -> None:
    known = accuracies(frames, "grass", BOTH)
    assert row(table, "grass")["average"] == f"{fmean(known):.2f} ± {stdev(known):.2f} (3); paper 34.22"
    assert row(table, "grass")["spread"] == f"{stdev(known):.2f} (3)"
    assert row(table, "lisa")["two steps"].startswith(f"{fmean(accuracies(frames, 'lisa', BOTH[:1])):.2f} ± ")
    cell = table.raw[(table.raw["method"] == "grass") & (table.raw["column"] == "average")].iloc[0]
    assert cell["measured"] == pytest.approx(fmean(known))
    assert (cell["published"], cell["tolerance"], cell["within_tolerance"]) == (34.22, 2.3, False)


def test_a_published_number_stands_in_its_own_cell_alone(frames: Frames) -> None:
    assert "paper" not in view_table(frames, study(), "table-2", published(table="Table 3")).display.to_string()
    assert "paper" not in view_table(frames, study(), "table-2", published(suites=BOTH[:1])).display["average"].iloc[-1]
    assert "paper" not in view_table(frames, study(), "table-2", None).display.to_string()


def test_a_row_without_a_run_stays_and_is_empty(frames: Frames) -> None:
    without = replace(frames, runs=frames.runs[frames.runs["method"] != "grass"])
    shown = row(view_table(without, study(), "table-2", published()), "grass")
    assert (shown["two steps"], shown["average"], shown["evidence"]) == ("—", "—; paper 34.22", "—")


def test_outcomes_that_do_not_count_are_named(table: Table) -> None:
    """One of LISA's runs was disengaged."""
    assert "(2); 1 disengaged" in row(table, "lisa")["average"]


def test_the_evidence_of_a_row(frames: Frames, table: Table) -> None:
    said = row(table, "grass")["evidence"]
    assert said.startswith(f"3 seeds × {2 * data.DOCUMENTS} items; +")
    assert " to lisa, p = " in said
    assert "leaked" in said
    assert any(f"4 of {2 * data.DOCUMENTS} items occur word for word" in note for note in table.footnotes)
    assert "stale" in row(table, "full")["evidence"]
    assert "untrained" in row(table, "base")["evidence"]
    limited = view_table(frames, study(task="choice", columns={"held out": {"suites": ("held-out",)}}), "table-2", None)
    assert "limited" in row(limited, "grass")["evidence"]


def test_the_difference_of_a_row_weighs_every_suite_the_same(frames: Frames, table: Table) -> None:
    """As the column does, by the seeds that both have."""

    def by_seed(method: str) -> dict[int, float]:
        ok = frames.ok_scores()
        mine = ok[(ok["method"] == method) & (ok["task"] == "arithmetic")]
        return {int(seed): 100 * float(of.mean()) for seed, of in mine.groupby("seed")["accuracy"]}  # type: ignore[call-overload]

    first, second = by_seed("grass"), by_seed("lisa")
    mean = fmean(first[seed] - second[seed] for seed in first.keys() & second.keys())
    (shown,) = re.findall(r"; \+([\d.]+) to lisa", row(table, "grass")["evidence"])
    assert float(shown) == pytest.approx(mean, abs=0.006)


def test_a_view_of_models_has_one_block(frames: Frames) -> None:
    made = view_table(
        frames,
        study(metric="throughput", methods=("full", "lora"), columns={"tiny": {"model": data.MODEL}}),
        "table-2",
        None,
    )
    assert list(made.display.columns) == ["method", "tiny", "evidence"]
    assert row(made, "full")["tiny"].endswith("(3)")
    assert r"\toprule" in made.latex()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"methods": ("grass", "grasp")}, "methods: the study has no method grasp"),
        ({"models": ("huge",)}, "models: the study has no model huge"),
        ({"task": "sums"}, "columns.two steps.task: the study has no task sums"),
        ({"task": None}, "columns.two steps.task: say here or for the whole view"),
        ({"columns": {"a": {"suites": ("held-out",)}}}, "columns.a.suites: task arithmetic has no suite held-out"),
        ({"columns": {"a": {}}}, "columns.a.suites: name them"),
        ({"columns": {"a": {"suites": BOTH, "metric": "throughput"}}}, "columns.a.suites: none belong to throughput"),
        ({"columns": {"a": {"suites": BOTH, "model": "huge"}}}, "columns.a.model: the study has no model huge"),
        (
            {"columns": {"a": {"suites": BOTH, "model": data.MODEL}, "b": {"suites": BOTH}}},
            "columns: either all of them name a model or none does",
        ),
    ],
)
def test_a_view_that_does_not_fit_its_study_is_refused(changed: dict[str, Any], said: str) -> None:
    body = data.study().model_dump() | {"views": {"table-2": VIEW | changed}}
    with pytest.raises(ValueError, match=r"views\.table-2\.") as refused:
        Study.model_validate(body, strict=False)
    assert said in str(refused.value)


def test_what_is_detectable_is_detected_in_four_of_five_cases() -> None:
    rng, spread, seeds, studies = np.random.default_rng(0), 0.02, 5, 2000
    least = [
        detectable(seed_difference(dict(enumerate(rng.normal(0, spread, seeds))), dict.fromkeys(range(seeds), 0.0)))
        for _ in range(studies)
    ]
    known = [one for one in least if one is not None]
    assert len(known) == studies
    true = float(np.sqrt(np.mean(np.square(known))))
    shown = [
        seed_difference(dict(enumerate(rng.normal(true, spread, seeds))), dict.fromkeys(range(seeds), 0.0)).p
        for _ in range(studies)
    ]
    assert np.mean([p is not None and p < 0.05 for p in shown]) == pytest.approx(0.8, abs=0.05)


def test_one_seed_detects_nothing() -> None:
    assert detectable(Difference(mean=0.1, seeds=1, documents=9)) is None
