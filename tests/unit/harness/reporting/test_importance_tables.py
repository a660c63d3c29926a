"""Tables and figures of importance: their numbers recomputed, their verdicts on known truths, and what is missing."""

from __future__ import annotations

import csv
import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reporting_data as data
from harness.reporting.drift import drifts
from harness.reporting.figures import write_figures
from harness.reporting.frames import Frames, read_frames, rows_to_frame, write_frames
from harness.reporting.importance_tables import importance_tables
from harness.reporting.page import write_page
from harness.reporting.table import Table
from harness.reporting.tables import write_tables
from harness.study.spec import Study
from probe_data import batches_of, with_probes
from scipy.stats import spearmanr

pytestmark = pytest.mark.usefixtures("empty_figures")

TRUTH = np.exp(0.5 * np.sin(np.arange(data.LAYERS)))
STUDY = data.study().model_copy(update={"published": None})


def frames_of(*, alike: bool) -> Frames:
    second = TRUTH if alike else TRUTH[::-1]
    norms = {"arithmetic": batches_of(TRUTH, seed=1), "choice": batches_of(second, seed=2)}
    return with_probes(data.frames(), data.MODEL, norms)


def tables_of(frames: Frames, study: Study = STUDY) -> dict[str, Table]:
    return {table.name: table for table in importance_tables(frames, study)}


def verdicts(frames: Frames, study: Study = STUDY) -> dict[str, str]:
    """By the beginning of the claim."""
    claims = tables_of(frames, study)["importance_claims"].raw
    return {str(row["claim"]).partition(",")[0]: str(row["verdict"]) for row in claims.to_dict("records")[::-1]}


# ---------------------------------------------------------------- verdicts


def test_tasks_of_one_order_are_alike_and_reversed_ones_differ() -> None:
    order = "the order of the layers differs between tasks"
    assert verdicts(frames_of(alike=False))[order] == "holds"
    same = verdicts(frames_of(alike=True))
    assert same[order] in {"does not hold", "cannot tell"}
    assert same["which layers are drawn depends on the task"] == "does not hold"


def test_a_peaked_profile_that_turns_round_moves_the_draws() -> None:
    peaked = TRUTH**3
    norms = {"arithmetic": batches_of(peaked, seed=1), "choice": batches_of(peaked[::-1], seed=2)}
    found = verdicts(with_probes(data.frames(), data.MODEL, norms))
    assert found["which layers are drawn depends on the task"] == "holds"
    flat = with_probes(data.frames(), data.MODEL, {"arithmetic": batches_of(TRUTH**0.1, seed=1)})
    assert verdicts(flat)["the sampler is uniform by another name"] == "holds"


def test_one_task_alone_leaves_the_question_open() -> None:
    alone = with_probes(data.frames(), data.MODEL, {"arithmetic": batches_of(TRUTH, seed=1)})
    found = verdicts(alone)["the order of the layers differs between tasks"]
    assert found == "cannot tell (fewer than two tasks were probed)"
    assert tables_of(alone)["importance_pairs"].raw.empty


# ---------------------------------------------------------------- numbers


def test_numbers_of_pairs_and_layers_are_those_of_the_raw_rows() -> None:
    frames = frames_of(alike=False)
    rows = [r for r in frames.probed.to_dict("records") if r["kind"] == "all"]
    means = {
        task: [
            statistics.fmean(r["gradient_rms"] for r in rows if r["task"] == task and r["layer"] == layer)
            for layer in range(data.LAYERS)
        ]
        for task in ("arithmetic", "choice")
    }
    tables = tables_of(frames)
    (pair,) = tables["importance_pairs"].raw.to_dict("records")
    assert pair["rank_correlation"] == pytest.approx(spearmanr(means["arithmetic"], means["choice"]).statistic)
    assert pair["rank_correlation_low"] <= pair["rank_correlation"] <= pair["rank_correlation_high"]
    layers = tables["importance_layers"].raw
    found = layers[(layers["task"] == "choice") & (layers["layer"] == 3)]["relative"].item()
    assert found == pytest.approx(means["choice"][3] / statistics.fmean(means["choice"]))


def test_a_task_has_its_blocks_its_loss_and_the_order_without_norms() -> None:
    table = tables_of(frames_of(alike=True))["importance_by_task"]
    row = table.raw.to_dict("records")[0]
    assert row["loss_nats_per_token"] == pytest.approx(2 + 23 / 2)
    shares = [row[f"squared_norm_share_{kind}"] for kind in ("mlp", "self_attn", "norm")]
    assert shares == pytest.approx([1 / 3] * 3)
    assert row["rank_correlation_without_norms"] == pytest.approx(1)
    assert not any("code that has changed" in note for note in table.footnotes)
    assert any("arithmetic, tiny: 20 % of the rows are cut at 128 tokens" in note for note in table.footnotes)


def test_a_probe_of_older_code_is_marked() -> None:
    frames = frames_of(alike=True)
    probes = frames.probes.assign(stale=[True, False]).astype(frames.probes.dtypes)
    table = tables_of(replace(frames, probes=probes))["importance_by_task"]
    assert table.display["batches"].tolist() == ["24 × 4^a^", "24 × 4"]
    assert "^a^ made by code that has changed since." in table.footnotes


def test_a_probe_without_memory_is_a_row_with_its_reason() -> None:
    norms = {"arithmetic": batches_of(TRUTH, seed=1), "choice": "in phase probe: host memory"}
    tables = tables_of(with_probes(data.frames(), data.MODEL, norms))
    display = tables["importance_by_task"].display
    assert display["batches"].tolist() == ["24 × 4", "oom^a^"]
    assert "^a^ in phase probe: host memory" in tables["importance_by_task"].footnotes
    assert tables["importance_layers"].raw["task"].unique().tolist() == ["arithmetic"]


# ---------------------------------------------------------------- over training


def moved(frames: Frames, *, by: float) -> Frames:
    """Observed norms that start at `TRUTH` and end at it (0) or at its reverse (1), the same for every seed."""
    observed = frames.observed.copy()
    share = by * observed["step"] / data.STEPS
    layers = observed["layer"].to_numpy(dtype=int)
    observed["gradient_rms"] = (1 - share) * TRUTH[layers] + share * TRUTH[::-1][layers]
    return replace(frames, observed=observed)


def test_an_order_that_turns_round_changes_and_one_that_stays_is_kept() -> None:
    frames = frames_of(alike=True)
    draws = "which layers are drawn depends on the stage"
    for by, verdict, claim in ((1.0, "changes", "holds"), (0.0, "keeps", "does not hold")):
        found = [d for d in drifts(moved(frames, by=by), STUDY) if len(d.last) >= 3]
        assert found
        assert {d.verdict for d in found} == {verdict}
        said = verdicts(moved(frames, by=by), without_few_seeds())
        assert said["the order of the layers changes over training"] == said[draws] == claim


def without_few_seeds() -> Study:
    """The made-up study has methods that lost seeds on one of its tasks; these could not tell."""
    methods = {label: entry for label, entry in STUDY.methods.items() if label in ("base", "grass", "grass-static")}
    return STUDY.model_copy(update={"methods": methods})


def test_without_a_probe_nobody_knows_how_much_rows_differ() -> None:
    found = drifts(data.frames(), STUDY)
    assert found
    assert all(d.noise is None and d.p is None for d in found)
    assert {d.verdict for d in found} == {"cannot tell (no probe says how far two choices of rows differ)"}


def test_the_noise_has_as_many_rows_as_the_observer() -> None:
    """32 rows are 8 batches of 4; a probe of 6 batches has 3 for each of two choices."""
    (first, *_) = drifts(frames_of(alike=True), STUDY)
    assert first.noise is not None
    assert first.noise.rows == 32
    few = with_probes(data.frames(), data.MODEL, {"arithmetic": batches_of(TRUTH, seed=1, count=6)})
    (first, *_) = drifts(few, STUDY)
    assert first.noise is not None
    assert first.noise.rows == 12


def test_two_seeds_are_too_few() -> None:
    frames = moved(frames_of(alike=True), by=1.0)
    two = [d for d in drifts(frames, STUDY) if len(d.last) == 2]
    assert {d.verdict for d in two} == {"cannot tell (2 seeds, 3 are needed)"}


# ---------------------------------------------------------------- the whole page


def test_a_study_with_probes_has_figures_tables_and_a_page(tmp_path: Path) -> None:
    frames = frames_of(alike=False)
    write_frames(frames, tmp_path)
    write_figures(frames, STUDY, tmp_path / "figures")
    write_tables(frames, STUDY, tmp_path / "tables")
    write_page(frames, STUDY, tmp_path, tmp_path / "report.html")
    captions = json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))
    wanted = {f"{kind}--tiny" for kind in ("probe-norms", "probe-blocks", "probe-correlations", "drift")}
    assert wanted <= captions.keys()
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(captions[name]["alt"] in text for name in wanted)
    assert "the order of the layers differs between tasks" in text
    with (tmp_path / "tables" / "importance_claims.csv").open(newline="", encoding="utf-8") as file:
        assert {row["model"] for row in csv.DictReader(file)} == {"tiny"}


def test_studies_from_before_probes_are_read_as_having_none(tmp_path: Path) -> None:
    write_frames(data.frames(), tmp_path)
    for name in ("probes", "probed"):
        (tmp_path / f"{name}.parquet").unlink()
    back = read_frames(tmp_path)
    assert back.probes.equals(rows_to_frame("probes", []))
    assert "importance_by_task" not in tables_of(back)
