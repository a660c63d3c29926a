"""Every table: one of its numbers recomputed from the raw rows by other code; and what must never happen in it."""

from __future__ import annotations

import argparse
import csv
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import reporting_data as data
from harness.errors import UserError
from harness.records.columns import FRAMES
from harness.reporting.frames import FrameError, Frames, read_frames, rows_to_frame, write_frames
from harness.reporting.published import Number, load_published, measured
from harness.reporting.table import Table
from harness.reporting.tables import write_tables
from harness.stages import tables as stage
from harness.study.strict_yaml import ConfigError
from house import ROOT

NAMES = (
    "accuracy", "heldout_loss", "difference_accuracy", "difference_heldout_loss", "efficiency", "learning_rates",
    "contamination", "clean_accuracy", "runs", "importance_claims", "importance_drift", "published",
)  # fmt: skip


@pytest.fixture(scope="module")
def frames() -> Frames:
    return data.frames()


@pytest.fixture(scope="module")
def folder(frames: Frames, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tables")
    study = data.study().model_copy(update={"published": str(ROOT / "config/published/grass.yaml")})
    write_tables(frames, study, made)
    return made


def rows(folder: Path, name: str, **where: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return [r for r in csv.DictReader(file) if all(r[k] == v for k, v in where.items())]


def raw(frames: Frames, name: str) -> list[dict[str, object]]:
    """Plain rows, so that nothing below shares code with the tables."""
    return getattr(frames, name).to_dict("records")


def runs_of(frames: Frames, task: str, method: str, *, ok: bool = True) -> list[str]:
    return [
        r["run"] for r in raw(frames, "runs")
        if r["task"] == task and r["method"] == method and (r["status"] == "ok" or not ok)
    ]  # fmt: skip


def test_tables_that_are_not_all_written_are_not_there(
    frames: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed job's folder would pass for a finished one."""
    usual, written = Table.write, []

    def stopped(table: Table, folder: Path) -> None:
        usual(table, folder)
        written.append(table.name)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Table, "write", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_tables(frames, data.study(), tmp_path / "tables")
    assert list(tmp_path.iterdir()) == []


def test_accuracy_is_the_mean_over_ok_runs_only(frames: Frames, folder: Path) -> None:
    good, everything = (runs_of(frames, "arithmetic", "lisa", ok=ok) for ok in (True, False))
    assert (len(good), len(everything)) == (2, 3)
    share = {
        run: statistics.fmean(
            d["correct"] for d in raw(frames, "documents") if d["run"] == run and d["suite"] == "two-step"
        )
        for run in everything
    }
    (row,) = rows(folder, "accuracy", method="lisa", suite="two-step")
    assert float(row["accuracy_mean_share"]) == pytest.approx(statistics.fmean(share[r] for r in good), abs=1e-15)
    assert float(row["accuracy_sd_share"]) == pytest.approx(statistics.stdev(share[r] for r in good), abs=1e-15)
    assert float(row["accuracy_mean_share"]) > 0.5 > share[everything[2]], "the disengaged run would pull it down"
    assert row["ok_runs"] == "2"
    assert row["other_runs"] == "1"


def test_a_disengaged_run_is_in_no_average_of_any_table(frames: Frames, folder: Path, tmp_path: Path) -> None:
    bad = frames.runs["status"] == "disengaged"
    without = replace(frames, runs=frames.runs[~bad])
    study = data.study().model_copy(update={"published": None})
    write_tables(without, study, tmp_path)
    for name in ("accuracy", "heldout_loss", "difference_accuracy", "difference_heldout_loss", "efficiency"):
        kept, removed = (
            pd.read_csv(f / f"{name}.csv").drop(columns="other_runs", errors="ignore") for f in (folder, tmp_path)
        )
        pd.testing.assert_frame_equal(kept, removed)


def test_other_outcomes_are_named_in_the_cell_with_their_reason(folder: Path) -> None:
    text = (folder / "accuracy.md").read_text(encoding="utf-8")
    assert re.search(r"lisa .*\(2\) \[[\d.]+\]; 1 disengaged<sup>(\w)</sup>", text)
    assert "disengaged: active set never rotated" in text
    assert re.search(r"lora † .*— \(3 skipped<sup>\w</sup>\)", text)
    assert "† lora departs from the study's recipe in: weight_decay." in text
    assert "4 occur word for word in the training rows" in text
    assert "not the whole test file" in text
    assert re.search(r"chance level .* 25\.0 ", text)


def test_heldout_loss(frames: Frames, folder: Path) -> None:
    values = []
    for run in runs_of(frames, "choice", "grass"):
        mine = [d for d in raw(frames, "documents") if d["run"] == run]
        values.append(sum(d["loss"] * d["tokens"] for d in mine) / sum(d["tokens"] for d in mine))
    (row,) = rows(folder, "heldout_loss", method="grass", suite="held-out")
    assert float(row["heldout_loss_mean_nats_per_token"]) == pytest.approx(statistics.fmean(values), abs=1e-12)


def test_paired_difference(frames: Frames, folder: Path) -> None:
    means = {}
    for method in ("grass", "lora"):
        scores = [s for s in raw(frames, "scores") if s["run"] in runs_of(frames, "arithmetic", method)]
        means[method] = statistics.fmean(s["accuracy"] for s in scores if s["suite"] == "three-step")
    (row,) = rows(folder, "difference_accuracy", suite="three-step", rival="lora")
    assert float(row["difference_share"]) == pytest.approx(means["grass"] - means["lora"], abs=1e-12)
    assert row["verdict"] == "higher"
    assert float(row["bootstrap_low_share"]) > 0
    assert not rows(folder, "difference_accuracy", rival="base"), "the untrained model is no rival"
    (skipped,) = rows(folder, "difference_accuracy", suite="held-out", rival="lora")
    assert skipped["difference_share"] == ""
    assert skipped["verdict"].startswith("no claim")
    (few,) = rows(folder, "difference_heldout_loss", suite="two-step", rival="lisa")
    assert few["verdict"] == "no claim (2 seeds in common, 3 are needed)"


def test_beside_every_difference_stands_the_least_that_could_have_been_seen(folder: Path) -> None:
    open_rows = 0
    for row in rows(folder, "difference_accuracy", suite="three-step"):
        low, high = float(row["seed_t_low_share"]), float(row["seed_t_high_share"])
        # at least the half interval: what covers 0 by chance half of the time is not seen in four of five cases
        assert float(row["detectable_share"]) > (high - low) / 2
        open_rows += row["verdict"].startswith("no claim")
    assert open_rows
    (few,) = rows(folder, "difference_accuracy", suite="held-out", rival="lora")
    assert few["detectable_share"] == ""
    assert "Detectable: the least true difference" in (folder / "difference_accuracy.md").read_text(encoding="utf-8")


def test_learning_rates(frames: Frames, folder: Path) -> None:
    losses = [
        t["validation_loss"] for t in raw(frames, "trials")
        if t["task"] == "choice" and t["method"] == "grass" and math.isclose(t["lr"], 3e-4)
    ]  # fmt: skip
    (row,) = (r for r in rows(folder, "learning_rates", task="choice", method="grass") if r["selected"] == "True")
    assert float(row["lr"]) == 3e-4
    assert float(row["validation_loss_mean_nats_per_token"]) == pytest.approx(sum(losses) / 2, abs=1e-15)
    text = (folder / "learning_rates.md").read_text(encoding="utf-8")
    assert re.search(
        r"arithmetic \| lora † +\| 1e-2 .* yes<sup>\w</sup> .* 1e-4, 3e-4, 1e-3 \| 3e-3, 1e-2 +\| 10", text
    )
    assert "1 of these trials gave no loss (diverged)" in text


def test_memory_and_throughput(frames: Frames, folder: Path) -> None:
    mine, full = (
        [r for r in raw(frames, "runs") if r["run"] in runs_of(frames, "arithmetic", m)] for m in ("lisa", "full")
    )
    (row,) = rows(folder, "efficiency", task="arithmetic", method="lisa")
    assert int(float(row["state_peak_bytes"])) == max(r["state_peak_bytes"] for r in mine)
    speed, base = (statistics.median(r["throughput_tokens_per_s"] for r in some) for some in (mine, full))
    assert float(row["throughput_ratio_to_full"]) == pytest.approx(speed / base, abs=1e-12)
    assert row["device_allocated_peak_bytes"] == "", "unknown is empty, never 0"
    text = (folder / "efficiency.md").read_text(encoding="utf-8")
    assert "the run was on the CPU" in text
    assert "no NVIDIA driver" in text


def test_no_throughput_ratio_across_machines(frames: Frames, tmp_path: Path) -> None:
    other = frames.runs.copy()
    other.loc[other["method"] == "full", "platform"] = "another machine"
    write_tables(replace(frames, runs=other), data.study().model_copy(update={"published": None}), tmp_path)
    (row,) = rows(tmp_path, "efficiency", task="arithmetic", method="grass")
    assert row["throughput_ratio_to_full"] == ""
    assert "on the same kind of machine" in (tmp_path / "efficiency.md").read_text(encoding="utf-8")


def test_every_run_is_listed(frames: Frames, folder: Path) -> None:
    listed = rows(folder, "runs")
    assert sorted(r["run"] for r in listed) == sorted(r["run"] for r in raw(frames, "runs"))
    (bad,) = (r for r in listed if r["status"] == "disengaged")
    assert bad["failed_checks"].startswith("rotation")
    assert listed[0]["method"] == "base", "in the order of the config"


def test_rows_that_never_entered_the_split_are_counted_by_task(frames: Frames, tmp_path: Path) -> None:
    of_task = frames.runs["task"] == "arithmetic"
    counted = frames.runs.assign(
        empty_rows=pd.array([0] * len(frames.runs), dtype="Int64"),
        overlapping_rows=pd.array([1364 if mine else 0 for mine in of_task], dtype="Int64"),
    )
    write_tables(replace(frames, runs=counted), data.study(), tmp_path)
    text = (tmp_path / "runs.md").read_text(encoding="utf-8")
    wanted = "arithmetic: left out before the split into training and validation rows: 1,364 that occur in a file"
    assert wanted in text
    assert "choice: left out" not in text
    assert {r["overlapping_rows"] for r in rows(tmp_path, "runs", task="arithmetic")} == {"1364"}


def test_csv_has_full_precision(frames: Frames, folder: Path) -> None:
    (row,) = rows(folder, "heldout_loss", method="base", suite="two-step")
    (run,) = runs_of(frames, "arithmetic", "base")
    (score,) = (s for s in raw(frames, "scores") if s["run"] == run and s["suite"] == "two-step")
    assert float(row["heldout_loss_mean_nats_per_token"]) == score["heldout_loss"]
    assert row["heldout_loss_sd_nats_per_token"] == ""


@pytest.mark.parametrize("name", NAMES)
def test_tex_is_well_formed(folder: Path, name: str) -> None:
    text = (folder / f"{name}.tex").read_text(encoding="utf-8")
    bare = re.sub(r"\\[\\{}%&_#$]", "", text)
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert "\\toprule" in text
    body = "\n".join(line for line in bare.splitlines() if not line.endswith("{!}{%"))
    assert "%" not in body
    assert "_" not in body.replace(f"\\label{{tab:{name}}}", "")
    assert "#" not in body
    assert text.isascii()
    widths = {line.count("&") for line in text.replace(r"\&", "").splitlines() if line.endswith("\\\\")}
    assert len(widths) == 1


def test_a_study_without_the_subject_compares_nothing(frames: Frames, tmp_path: Path) -> None:
    study = data.study()
    rest = {label: entry for label, entry in study.methods.items() if label != "grass"}
    without = replace(frames, runs=frames.runs[frames.runs["method"] != "grass"])
    write_tables(without, study.model_copy(update={"methods": rest, "published": None}), tmp_path)
    assert rows(tmp_path, "difference_accuracy") == []
    assert "nothing to compare" in (tmp_path / "difference_accuracy.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------- published


def test_published_file_holds_the_known_numbers(folder: Path) -> None:
    numbers = load_published(ROOT / "config/published/grass.yaml").numbers
    averages = {(n.model, n.method): n.value for n in numbers if len(n.suites) == 6}
    assert averages["tinyllama", "grass"] == 34.22
    assert averages["llama2-7b", "grass-static"] == 56.59
    assert len(averages) == 18
    assert sum(n.table == "Table 2" and len(n.suites) == 1 for n in numbers) == 21
    assert sum(n.table == "Table 3" for n in numbers) == sum(n.table == "Table 4" for n in numbers) == 15
    assert all(r["measured"] == "" and r["measured_why"] for r in rows(folder, "published")), "nothing was run on these"


def test_measured_average_needs_every_suite(frames: Frames) -> None:
    n = Number(
        table="t", model=data.MODEL, task="arithmetic", suites=("two-step", "three-step"), method="grass",
        metric="accuracy", unit="percent", value=60.0, source="Q", status="FOUND", tolerance=1.0, tolerance_why="x",
    )  # fmt: skip
    mine = [s for s in raw(frames, "scores") if s["run"] in runs_of(frames, "arithmetic", "grass")]
    value, count, _ = measured(n, frames)
    assert value == pytest.approx(100 * statistics.fmean(s["accuracy"] for s in mine))
    assert count == 3
    value, count, why = measured(n.model_copy(update={"suites": ("two-step", "gsm8k")}), frames)
    assert (value, count) == (None, 0)
    assert "not every suite" in why


def test_an_unknown_key_in_a_published_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text('title: "x"\nsources: {}\ntolerances: {}\nnumbers:\n  - {tabel: "Table 2"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"p\.yaml:5"):
        load_published(file)


# ---------------------------------------------------------------- frames and stage


def test_frames_come_back_as_they_were_and_bytes_repeat(frames: Frames, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_frames(frames, tmp_path / name)
    back = read_frames(tmp_path / "a")
    for name in FRAMES:
        pd.testing.assert_frame_equal(getattr(back, name), getattr(frames, name))
        assert (tmp_path / "a" / f"{name}.parquet").read_bytes() == (tmp_path / "b" / f"{name}.parquet").read_bytes()


def test_a_wrong_column_is_named_with_its_file(frames: Frames, tmp_path: Path) -> None:
    write_frames(frames, tmp_path)
    frames.steps.drop(columns="loss").to_parquet(tmp_path / "steps.parquet")
    with pytest.raises(UserError, match=r"steps\.parquet: column 'loss' is missing"):
        read_frames(tmp_path)
    frames.steps.assign(loss="x").to_parquet(tmp_path / "steps.parquet")
    with pytest.raises(UserError, match=r"steps\.parquet: column 'loss' is str"):
        read_frames(tmp_path)
    (tmp_path / "steps.parquet").unlink()
    with pytest.raises(UserError, match="no such file"):
        read_frames(tmp_path)


def test_rows_to_frame_refuses_what_does_not_fit() -> None:
    good = dict.fromkeys(FRAMES["trials"])
    assert rows_to_frame("trials", []).dtypes.astype(str).to_dict() == FRAMES["trials"]
    with pytest.raises(FrameError, match=r"missing columns \['lr'\]"):
        rows_to_frame("trials", [{k: v for k, v in good.items() if k != "lr"}])
    with pytest.raises(FrameError, match="column 'seed'"):
        rows_to_frame("trials", [good | {"seed": 1.5}])


def test_stage_writes_the_tables(frames: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_frames(frames, tmp_path)
    monkeypatch.setattr(stage, "load_study", lambda path, **_: data.study().model_copy(update={"published": None}))
    parser = argparse.ArgumentParser()
    stage.add_arguments(parser)
    args = parser.parse_args(["--config", "x", "--frames", str(tmp_path), "--out", str(tmp_path / "tables")])
    assert stage.run(args) == 0
    assert {p.name for p in (tmp_path / "tables").iterdir()} == {"tables.json"} | {
        f"{n}.{s}" for n in NAMES if n != "published" for s in ("csv", "md", "tex")
    }
