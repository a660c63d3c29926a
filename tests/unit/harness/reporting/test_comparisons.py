"""Comparisons: a table and figures for some of a study's methods, checked against the raw rows."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

import pytest
import reporting_data as data
from harness.reporting.figures import write_figures
from harness.reporting.frames import Frames, write_frames
from harness.reporting.page import write_page
from harness.reporting.tables import write_tables
from harness.study.spec import Comparison, Study
from pydantic import ValidationError

pytestmark = pytest.mark.usefixtures("empty_figures")

COMPARISON = Comparison(
    title="Layer-wise <methods>", methods=("lisa", "grass", "lora"), reading="They differ in how layers are drawn."
)
STUDY = data.study().model_copy(update={"published": None, "comparisons": {"layer-wise": COMPARISON}})


@pytest.fixture(scope="module")
def frames() -> Frames:
    return data.frames()


@pytest.fixture(scope="module")
def folder(frames: Frames, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("study")
    write_frames(frames, made)
    write_tables(frames, STUDY, made / "tables")
    write_figures(frames, STUDY, made / "figures")
    write_page(frames, STUDY, made, made / "report.html")
    return made


def table(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (folder / "tables" / "comparison_layer-wise.csv").open(newline="", encoding="utf-8") as file:
        return {(row["suite"], row["method"]): row for row in csv.DictReader(file)}


def test_the_rows_are_the_comparisons_methods_in_its_order(folder: Path) -> None:
    suites = [suite for names in data.SUITES.values() for suite in names]
    assert list(table(folder)) == [(suite, method) for suite in suites for method in COMPARISON.methods]


def test_the_difference_is_to_the_first_method_seed_by_seed(frames: Frames, folder: Path) -> None:
    documents = frames.documents.merge(frames.runs[["run", "method", "task", "seed", "status"]], on="run")
    documents = documents[(documents["suite"] == "held-out") & (documents["status"] == "ok")]
    per_token = {
        key: float((rows["loss"] * rows["tokens"]).sum() / rows["tokens"].sum())
        for key, rows in documents.groupby(["method", "seed"])
    }
    wanted = statistics.mean(per_token["grass", s] - per_token["lisa", s] for s in data.SEEDS)
    found = table(folder)
    assert float(found["held-out", "grass"]["difference_nats_per_token"]) == pytest.approx(wanted, rel=1e-6)
    assert found["held-out", "lisa"]["difference_nats_per_token"] == ""


def test_a_method_without_ok_runs_has_its_reason_and_no_number(folder: Path) -> None:
    row = table(folder)["held-out", "lora"]
    assert (row["ok_runs"], row["other_runs"], row["heldout_loss_mean_nats_per_token"]) == ("0", "3", "")
    assert "needs peft" in (folder / "tables" / "comparison_layer-wise.md").read_text(encoding="utf-8")


def test_the_trainable_share_is_of_the_models_parameters(frames: Frames, folder: Path) -> None:
    runs = frames.runs[(frames.runs["method"] == "grass") & (frames.runs["status"] == "ok")]
    wanted = float(runs["trainable_parameters"].max() / runs["parameters"].max())
    assert float(table(folder)["held-out", "grass"]["trainable_share"]) == pytest.approx(wanted)


def test_figures_with_a_line_a_method_are_drawn_for_each_comparison(folder: Path) -> None:
    captions = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    for kind in ("results", "learning-rates", "loss", "agreement"):
        assert f"{kind}--tiny--layer-wise" in captions
        assert f"{kind}--tiny" not in captions
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Layer-wise &lt;methods&gt;" in page
    assert COMPARISON.reading in page


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"methods": ["lisa", "liza"]}, "comparisons.layer-wise.methods: the study has no method liza"),
        ({"methods": ["lisa", "lisa"]}, "comparisons.layer-wise.methods: each method once"),
    ],
)
def test_a_comparison_of_unknown_or_repeated_methods_is_refused(change: dict[str, object], complaint: str) -> None:
    body = json.loads(STUDY.model_dump_json())
    body["comparisons"]["layer-wise"] |= change
    with pytest.raises(ValidationError, match=complaint):
        Study.model_validate_json(json.dumps(body))


def test_a_comparison_and_a_method_must_not_share_a_label() -> None:
    body = json.loads(STUDY.model_dump_json())
    body["comparisons"] = {"lisa": body["comparisons"]["layer-wise"]}
    with pytest.raises(ValidationError, match="a method has this label"):
        Study.model_validate_json(json.dumps(body))
