"""The table of runs' memory and speed: what it shows, leaves out and marks; and what older versions wrote is read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import reporting_data as data
from harness.errors import UserError
from harness.measuring.energy import COUNTS, OLDER
from harness.records.columns import ADDED, FRAMES
from harness.records.measured import EVALUATION, largest
from harness.records.reading import read
from harness.records.run import EvalRecord, SearchRecord, TrainRecord
from harness.reporting import record_rows
from harness.reporting.comparison_tables import comparison_table
from harness.reporting.frames import Frames, read_frames, rows_to_frame, write_frames
from harness.reporting.run_tables import efficiency_table, run_table
from harness.reporting.score_tables import ACCURACY, HELDOUT_LOSS, score_table
from harness.reporting.table import Table
from harness.study.spec import Comparison
from house import ROOT

# ---------------------------------------------------------------- tables


@pytest.fixture(scope="module")
def frames() -> Frames:
    return data.frames()


def header(table: Table) -> list[str]:
    return [str(column) for column in table.display.columns]


def grass_row(table: Table) -> dict[str, Any]:
    raw = table.raw
    (row,) = raw[(raw["method"] == "grass") & (raw["task"] == "arithmetic")].to_dict("records")
    return {str(key): value for key, value in row.items()}


def of_grass(frames: Frames) -> Any:
    return (frames.runs["method"] == "grass") & (frames.runs["task"] == "arithmetic")


def test_new_columns_are_shown_only_where_something_is_known(frames: Frames) -> None:
    study = data.study()
    table = efficiency_table(frames, study)
    assert {"step p95 (ms)", "tokens/s with padding"} <= set(header(table))
    unknown = {"host PSS (MiB)", "pinned by the method (MiB)", "device reserved (MiB)", "device delta (MiB)"}
    assert not unknown & set(header(table))
    assert "device_reserved_peak_bytes" in table.raw, "the csv has every column always"
    assert grass_row(table)["step_p95_s"] == 0.6

    runs = frames.runs.copy()
    runs.loc[of_grass(frames), ["host_pss_bytes", "nvml_device_delta_peak_bytes"]] = 3 * 2**20
    runs.loc[of_grass(frames), "method_pinned_peak_bytes"] = 0  # known, and nothing to show
    table = efficiency_table(replace(frames, runs=runs), study)
    assert unknown & set(header(table)) == {"host PSS (MiB)", "device delta (MiB)"}
    shown = dict(zip(table.display["method"], table.display["device delta (MiB)"], strict=True))
    assert shown["lisa"] == "—"
    assert "3.0" in set(table.display["host PSS (MiB)"])
    assert any("stands for the process where the driver does not list it" in note for note in table.footnotes)


def test_a_table_leaves_voided_runs_out_of_memory_and_speed_and_in_accuracy(frames: Frames) -> None:
    study = data.study()
    runs, mine = frames.runs.copy(), of_grass(frames)
    why = "another compute process was on the GPU during the run (pid 4711)"
    void = ["throughput_tokens_per_s", "throughput_total_tokens_per_s", "step_median_s", "step_p95_s", "train_s"]

    def voided(which: Any) -> Frames:
        runs.loc[which, void] = None
        runs.loc[which, "foreign_why"], runs.loc[which, "throughput_why"] = why, f"void: {why}"
        return replace(frames, runs=runs)

    one = voided(mine & (runs["seed"] == 0))
    table = efficiency_table(one, study)
    rest = frames.runs.loc[mine & (frames.runs["seed"] != 0), "throughput_tokens_per_s"]
    assert grass_row(table)["throughput_median_tokens_per_s"] == pytest.approx(rest.median())
    assert grass_row(table)["runs_beside_a_foreign_process"] == 1
    assert any(text.startswith("3; 1 not alone^") for text in table.display["ok runs"])
    assert any(note.endswith(f"count in no figure of device memory or speed: {why}.") for note in table.footnotes)
    for kind in (ACCURACY, HELDOUT_LOSS):
        pd.testing.assert_frame_equal(score_table(one, study, kind).raw, score_table(frames, study, kind).raw)

    table = efficiency_table(voided(mine), study)
    assert pd.isna(grass_row(table)["throughput_median_tokens_per_s"])
    assert pd.isna(grass_row(table)["throughput_ratio_to_full"])
    assert any(note.endswith(f"void: {why}") for note in table.footnotes), "where no run was alone, the dash says why"


def test_a_speed_beside_an_emptied_cache_is_marked(frames: Frames) -> None:
    study = data.study()
    runs = frames.runs.copy()
    mark = "the allocator ran out of memory and emptied its cache: the time is not comparable."
    for retries, marked in ((0, False), (2, True)):
        runs["alloc_retries"] = pd.array([retries] * len(runs), dtype="Int64")
        table = efficiency_table(replace(frames, runs=runs), study)
        assert any(mark in note for note in table.footnotes) == marked


def test_energy_is_the_median_of_the_ok_runs_or_a_dash_with_the_reason(frames: Frames) -> None:
    study, mine = data.study(), of_grass(frames)
    study_of_two = study.model_copy(
        update={"comparisons": {"two": Comparison(title="Two", methods=("lora", "grass"), reading="They differ.")}}
    )
    table = efficiency_table(frames, study)
    assert grass_row(table)["energy_median_j_per_1000_tokens"] is None
    assert any(note.endswith(OLDER) for note in table.footnotes)
    assert "J/1,000 tokens" not in comparison_table(frames, study_of_two, "two").display

    runs = frames.runs.copy()
    ok = mine & (runs["status"] == "ok")
    assert ok.sum() == 3
    runs["energy_why"] = "the run was on the CPU"
    runs.loc[ok, "energy_j_per_1000_tokens"] = [7.0, 9.5, 8.25]
    runs.loc[ok, "energy_why"] = None
    known = replace(frames, runs=runs)
    table = efficiency_table(known, study)
    assert grass_row(table)["energy_median_j_per_1000_tokens"] == 8.25
    here = (table.display["task"] == "arithmetic") & (table.display["method"].str.startswith("grass"))
    assert "8.25" in set(table.display.loc[here, "J/1,000 tokens"])
    assert any(note.endswith("the run was on the CPU") for note in table.footnotes)
    compared = comparison_table(known, study_of_two, "two")
    assert {"8.25", "—"} <= set(compared.display["J/1,000 tokens"])
    for made in (table, compared):
        assert any(note.startswith(COUNTS) for note in made.footnotes)


def test_a_run_of_a_dirty_tree_or_of_another_machine_is_marked(frames: Frames) -> None:
    dirty, other = "made by code with changes that were not committed.", "Linux aarch64, Other CPU, cpu"
    usual = " ".join(run_table(frames, data.study()).footnotes)
    assert dirty not in usual
    assert "another machine" not in usual
    runs = frames.runs.copy()
    changed, moved = runs.index[of_grass(frames)][:2]
    runs.loc[runs.index != changed, "git_dirty"] = False
    runs.loc[changed, "git_dirty"] = True
    runs.loc[moved, "platform"] = "Linux aarch64, Other CPU"
    table = run_table(replace(frames, runs=runs), data.study())
    said = " ".join(table.footnotes)
    assert dirty in said
    assert f"made on another machine than most runs here: {other}." in said
    marked = table.raw["run"][["^" in shown for shown in table.display["id"]]]
    assert set(marked) == {runs.loc[changed, "run"], runs.loc[moved, "run"]}


def test_evaluation_is_no_part_of_a_runs_peak() -> None:
    assert largest({"load": 5, "steady": 9, "eval": 50, "save": None}, without=EVALUATION) == 9
    assert largest({"eval": 50}, without=EVALUATION) is None


# ---------------------------------------------------------------- what was written before


def test_published_records_and_tables_are_still_read() -> None:
    published = ROOT / "results" / "published"
    records = 0
    for kind, pattern in ((TrainRecord, "train.json"), (EvalRecord, "eval/*.json"), (SearchRecord, "search.json")):
        for file in published.glob(f"*/records/*/*/{pattern}"):
            read(file, kind)
            records += 1
    assert records > 0
    for folder in {file.parent for file in published.glob("*/runs.parquet")}:
        frames = read_frames(folder)
        assert len(frames.runs) > 0
        assert {name: dict(getattr(frames, name).dtypes.astype(str)) for name in FRAMES} == FRAMES


def test_a_column_that_older_tables_lack_is_null_and_any_other_still_missed(frames: Frames, tmp_path: Path) -> None:
    write_frames(frames, tmp_path)
    frames.runs.drop(columns=list(ADDED["runs"])).to_parquet(tmp_path / "runs.parquet")
    assert read_frames(tmp_path).runs["timed_steps"].isna().all()
    frames.runs.drop(columns=["throughput_why"]).to_parquet(tmp_path / "runs.parquet")
    with pytest.raises(UserError, match="'throughput_why' is missing"):
        read_frames(tmp_path)


def test_steps_written_before_padding_was_counted_become_rows() -> None:
    old = {"step": 0, "loss": 1.0, "lr_factor": 1.0, "grad_norm": None, "clipped": None, "tokens": 9, "step_s": 0.1}
    rows = [record_rows.step_row("run", row) for row in (old, {**old, "total_tokens": 12})]
    totals = rows_to_frame("steps", rows)["total_tokens"]
    assert totals.isna().tolist() == [True, False]
    assert totals.tolist()[1] == 12
