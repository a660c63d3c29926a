"""The answer at the head of a report: right on made-up runs whose truth is known, and silent where it is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import reporting_data as data
from harness.reporting.answer import Answer, answer, answer_table
from harness.reporting.frames import Frames
from harness.study.spec import Question, Study
from pydantic import ValidationError

ASKED = Question(
    ask="Does it help?", method="grass", controls={"grass-static": "only refreshing differs", "base": "untrained"}
)


def study(asked: Question | None = ASKED) -> Study:
    return data.study().model_copy(update={"question": asked})


def shifted(*, points: float, nats: float) -> Frames:
    """Frames in which grass is grass-static, but for a shift and a little noise by seed and item."""
    frames, rng = data.frames(), np.random.default_rng(7)
    runs, documents, scores = frames.runs.copy(), frames.documents.copy(), frames.scores
    for row in runs[runs["method"] == "grass"].to_dict("records"):
        twin = runs[(runs["method"] == "grass-static") & (runs["task"] == row["task"]) & (runs["seed"] == row["seed"])]
        mine, theirs = documents["run"] == row["run"], documents["run"] == twin["run"].iloc[0]
        correct = documents.loc[theirs, "correct"].to_numpy(dtype=bool)
        flips = rng.random(len(correct)) < abs(points)
        documents.loc[mine, "correct"] = np.where(flips, points > 0, correct)
        noise = nats * (1 + 0.05 * rng.standard_normal(len(correct)))
        documents.loc[mine, "loss"] = documents.loc[theirs, "loss"].to_numpy(dtype=float) + noise
        runs.loc[runs["run"] == row["run"], "validation_loss"] = 0.45 + 0.01 * row["seed"] + noise.mean()
    return replace(frames, runs=runs, documents=documents, scores=scores)


def found(frames: Frames) -> Answer:
    made = answer(frames, study())
    assert made is not None
    return made


def test_no_question_no_answer() -> None:
    assert answer(data.frames(), study(None)) is None


def test_a_better_method_is_called_better() -> None:
    made = found(shifted(points=0.5, nats=-0.2))
    assert made.short.startswith("Yes, against grass-static (only refreshing differs): better in ")
    assert "held-out loss of arithmetic (tiny)" in made.short


def test_a_worse_method_is_called_worse() -> None:
    assert found(shifted(points=-0.5, nats=0.2)).short.startswith("No, against grass-static")


def test_what_is_better_in_one_and_worse_in_another_is_called_both() -> None:
    assert found(shifted(points=0.5, nats=0.2)).short.startswith("Both: against grass-static")


def test_no_difference_is_no_claim() -> None:
    assert found(shifted(points=0.0, nats=0.0)).short.startswith("Cannot tell: against grass-static")


def test_without_runs_it_says_so() -> None:
    frames = data.frames()
    assert "no finished runs" in found(replace(frames, runs=frames.runs.iloc[:0])).short


def test_without_the_first_control_the_next_one_is_told() -> None:
    frames = shifted(points=0.5, nats=-0.2)
    asked = Question(ask="Does it help?", method="grass", controls={"absent": "isolates", **ASKED.controls})
    made = answer(frames, study(asked))
    assert made is not None
    assert made.short.startswith(
        "Cannot tell: no finished runs to compare against absent (isolates). Yes, against grass-static"
    )
    first = answer_table(frames, study(asked), asked).display.iloc[0]
    assert (first["difference"], first["95 % interval"], first["seeds × items"]) == ("—", "—", "none")


def test_the_table_recomputes_from_the_rows() -> None:
    frames = shifted(points=0.5, nats=-0.2)
    table = answer_table(frames, study(), ASKED)
    raw = table.raw
    row = raw[(raw["task"] == "arithmetic") & (raw["measure"] == "accuracy") & (raw["control"] == "grass-static")].iloc[
        0
    ]
    share = {}
    for method in ("grass", "grass-static"):
        runs = frames.runs[(frames.runs["method"] == method) & (frames.runs["task"] == "arithmetic")]["run"]
        share[method] = float(frames.documents[frames.documents["run"].isin(runs)]["correct"].astype(float).mean())
    assert row["difference"] == pytest.approx(100 * (share["grass"] - share["grass-static"]), abs=1e-9)
    assert (row["seeds"], row["items"]) == (3, 2 * data.DOCUMENTS)
    assert row["low"] < row["difference"] < row["high"]
    assert len(raw) == 2 * 3 * 2, "tasks x measures x controls"


def test_the_reasons_name_what_the_sampler_did() -> None:
    text = " ".join(found(data.frames()).reasons)
    for part in ("effective layers of 8", "drawn most", "believed and true importance", "before training"):
        assert part in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "nobody"}, "no method nobody"),
        ({"controls": {"nobody": "x"}}, "no method nobody"),
        ({"controls": {"grass": "x"}}, "cannot be compared with itself"),
    ],
)
def test_a_question_about_a_method_that_is_not_there_is_refused(change: dict[str, object], message: str) -> None:
    body = data.study().model_dump() | {"question": ASKED.model_dump() | change}
    with pytest.raises(ValidationError, match=message):
        Study.model_validate(body)
