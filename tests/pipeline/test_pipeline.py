"""One whole small study through Snakemake: run, run again, lose a figure, lose a job, edit the config."""

from __future__ import annotations

import csv
import html
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from harness.records.locks import try_lock
from house import ROOT
from kills import KILLS, SAID, Kill, differences

pytestmark = pytest.mark.pipeline


class Study:
    """A working folder with one config, and Snakemake on it."""

    def __init__(self, folder: Path) -> None:
        # with spaces, as people's folders have them; and a stranger's file has any name
        self.folder, self.config = folder, folder / "my configs" / "micro $(touch run).yaml"
        self.first: subprocess.CompletedProcess[str]
        self.config.parent.mkdir()
        shutil.copy(ROOT / "tests" / "pipeline" / "micro.yaml", self.config)

    @property
    def command(self) -> list[str]:
        return [
            sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--directory", str(self.folder),
            "--profile", str(ROOT / "profiles" / "default"), "--cores", "2", "--config", f"STUDY={self.config}",
        ]  # fmt: skip

    def snakemake(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self.command, *words], capture_output=True, text=True, timeout=400, cwd=self.folder)

    def results(self) -> dict[str, int]:
        """Every file under results/ and when it was written."""
        return {
            str(p.relative_to(self.folder)): p.stat().st_mtime_ns
            for p in (self.folder / "results").rglob("*")
            if p.is_file()
        }

    def run(self, method: str) -> Path:
        (folder,) = (self.folder / "results" / "runs").glob(f"mini--arithmetic--{method}--seed0--*")
        return folder


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    made = Study(tmp_path_factory.mktemp("my study"))
    made.first = made.snakemake()
    assert made.first.returncode == 0, made.first.stdout[-3000:] + made.first.stderr[-3000:]
    return made


def test_the_study_ends_in_a_page_with_tables_and_figures(study: Study) -> None:
    out = study.folder / "results" / "micro"
    page = (out / "report.html").read_text(encoding="utf-8")
    first = (out / "report.txt").read_text(encoding="utf-8").splitlines()
    assert first
    assert all(line.removeprefix("- ") in html.unescape(page) for line in first)
    assert "accuracy" in page.lower()
    # self-contained: nothing is fetched when it is opened
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', page)
    importance = ("importance_claims", "importance_by_task", "importance_layers", "importance_drift")
    for name in ("accuracy", "heldout_loss", "runs", "efficiency", "learning_rates", *importance):
        for kind in ("csv", "md", "tex"):
            assert (out / "tables" / f"{name}.{kind}").stat().st_size > 0
    figures = {p.stem for p in (out / "figures").glob("*.svg")}
    assert any(name.startswith("importance--mini--grass") for name in figures)
    assert {"probe-norms--mini", "probe-blocks--mini", "drift--mini"} <= figures
    assert figures == {p.stem for p in (out / "figures").glob("*.png")}


def test_a_command_in_the_name_of_the_config_is_not_run(study: Study) -> None:
    assert not (study.folder / "run").exists()


def test_every_run_is_engaged_and_scored(study: Study) -> None:
    for method in ("base", "full", "lisa", "grass"):
        record = json.loads((study.run(method) / "train.json").read_text())
        assert (record["status"], record["status_why"]) == ("ok", None)
        (score,) = (study.run(method) / "eval").glob("*.json")
        assert json.loads(score.read_text())["scores"][0]["rows"] == 20


def test_a_number_of_each_table_is_what_the_raw_records_say(study: Study) -> None:
    """Accuracy from the documents, held-out loss from documents and tokens, state bytes from the run's own record."""
    (documents,) = (study.run("full") / "eval").glob("*.parquet")
    raw = pd.read_parquet(documents)
    tables = study.folder / "results" / "micro" / "tables"
    accuracy = sum(bool(c) for c in raw["correct"]) / len(raw)
    assert _holds(tables / "accuracy.csv", "full", "accuracy_mean_share", accuracy)
    loss = sum(x * n for x, n in zip(raw["loss"], raw["tokens"], strict=True)) / sum(raw["tokens"])
    assert _holds(tables / "heldout_loss.csv", "full", "heldout_loss_mean_nats_per_token", loss)
    record = json.loads((study.run("grass") / "train.json").read_text())
    assert _holds(tables / "efficiency.csv", "grass", "state_peak_bytes", record["memory"]["state_peak_bytes"])
    assert _holds(tables / "efficiency.csv", "grass", "trainable_parameters", record["trainable_parameters"])
    chosen = [row for row in _rows(tables / "learning_rates.csv", "grass") if row["selected"] == "True"]
    assert [float(row["lr"]) for row in chosen] == [record["lr"]]


def test_importance_of_a_layer_is_what_the_probe_recorded(study: Study) -> None:
    (file,) = (study.folder / "results" / "probes").glob("mini--arithmetic--*/probe.json")
    record = json.loads(file.read_text())
    assert (record["status"], len(record["batches"])) == ("ok", 6)
    means = [sum(column) / 6 for column in zip(*(b["gradient_rms"] for b in record["batches"]), strict=True)]
    with (study.folder / "results" / "micro" / "tables" / "importance_layers.csv").open(newline="") as table:
        found = [float(row["relative"]) for row in csv.DictReader(table)]
    assert found == pytest.approx([4 * mean / sum(means) for mean in means])


def test_a_cell_of_the_heat_maps_is_what_the_raw_logs_say(study: Study) -> None:
    lines = [json.loads(line) for line in (study.run("grass") / "observed.jsonl").read_text().splitlines()]
    frame = pd.read_parquet(study.folder / "results" / "micro" / "observed.parquet")
    mine = frame[frame["run"] == study.run("grass").name]
    last = lines[-1]
    cell = mine[(mine["step"] == last["step"]) & (mine["layer"] == 2)]["gradient_rms"].item()
    assert cell == last["gradient_rms"][2]
    believed = [json.loads(line) for line in (study.run("grass") / "believed.jsonl").read_text().splitlines()]
    frame = pd.read_parquet(study.folder / "results" / "micro" / "believed.parquet")
    mine = frame[(frame["run"] == study.run("grass").name) & (frame["step"] == believed[-1]["step"])]
    assert mine.sort_values("layer")["importance"].tolist() == believed[-1]["importance"]
    assert set(mine[mine["active"]]["layer"]) == set(believed[-1]["active"])


def test_the_plan_calls_everything_done_and_nothing_stale(study: Study) -> None:
    command = [sys.executable, "-m", "harness", "plan", "--config", str(study.config), "--all"]
    said = subprocess.run(command, capture_output=True, text=True, cwd=study.folder, check=True).stdout
    assert "done" in said
    assert "stale" not in said
    assert "to do" not in said


def test_every_job_left_a_log_and_its_line_was_seen_as_well(study: Study) -> None:
    logs = study.folder / "results" / "logs"
    said = {path.parent.name: path.read_text(encoding="utf-8") for path in logs.rglob("*.log")}
    assert said.keys() == {
        "pretrain", "prefetch_rows", "prefetch_suite", "overlap", "probe", "search", "train", "evaluate", "collect",
        "tables", "figures", "page",
    }  # fmt: skip
    for rule in ("pretrain", "search", "train", "evaluate"):
        (line,) = (line for line in said[rule].splitlines() if f"{rule} mini" in line)
        assert line in study.first.stderr


def test_a_second_run_has_nothing_to_do(study: Study) -> None:
    before = study.results()
    again = study.snakemake()
    assert "Nothing to be done" in again.stdout + again.stderr
    assert study.results() == before


def test_a_lost_figure_is_drawn_again_and_nothing_else_is_made(study: Study) -> None:
    before = study.results()
    shutil.rmtree(study.folder / "results" / "micro" / "figures")
    assert study.snakemake().returncode == 0
    after = study.results()
    assert set(after) == set(before)
    changed = {name for name in after if after[name] != before[name]}
    drawn = {name for name in changed if Path(name).parent.name == "figures"}
    assert drawn
    assert changed - drawn == {"results/micro/figures.json"}


@pytest.mark.parametrize(
    "kills", [KILLS[2:3], pytest.param(KILLS, marks=pytest.mark.exhaustive)], ids=["once", "six times"]
)
def test_however_often_it_is_killed_it_ends_as_one_that_was_not(
    kills: tuple[Kill, ...], study: Study, tmp_path: Path
) -> None:
    """The same command each time, nothing by hand; some jobs outlive their Snakemake, and are waited for."""
    other = Study(tmp_path)
    text = other.config.read_text()
    other.config.write_text(
        "".join(line for line in text.splitlines(True) if "module: full" not in line and "lisa" not in line)
    )
    for kill in kills:
        assert kill.carry_out(other) is not None, (
            f"{kill}: the study ended before: {(other.folder / SAID).read_text()[-3000:]}"
        )
        if kill.number == signal.SIGTERM:
            # how fast is what the soak tells: here nothing more is begun, not even the tables of what is there
            (log,) = (other.folder / "results" / "logs" / "search").glob("*--grass--*.log")
            assert "stopped by SIGTERM; the same command again goes on from here" in log.read_text()
            assert not (other.folder / "results" / "micro" / "partial").exists()
    to_the_end = kills == KILLS
    done = other.snakemake(*(() if to_the_end else ("--until", "evaluate")))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert differences(study.folder / "results", other.folder / "results") == []
    assert (other.folder / "results" / "micro" / "report.html").is_file() == to_the_end
    left = [path for path in (other.folder / "results").rglob(".*") if path.suffix in {".part", ".lock"}]
    assert left == []


STAGES = {
    "probe": "probes/*/probe.json",
    "search": "searches/*/search.json",
    "train": "runs/*/train.json",
    "evaluate": "runs/*/eval/*.json",
}
"""Stages that work in warm workers, and what each writes."""


@pytest.mark.parametrize(
    "stages", [["train", "evaluate"], pytest.param(list(STAGES), marks=pytest.mark.exhaustive)], ids="-".join
)
def test_a_fresh_process_writes_the_bits_that_a_warm_worker_wrote(
    stages: list[str], study: Study, tmp_path: Path
) -> None:
    """The command of a job, without the client before it; what is not made again is copied."""
    fresh, warm = tmp_path / "results", tmp_path / "warm"
    shutil.copytree(study.folder / "results", warm)
    kept = study.run("grass").name
    for other in warm.glob("runs/*"):
        if other.name != kept:
            shutil.rmtree(other)
    folders = {stage: written.partition("/")[0] for stage, written in STAGES.items()}
    made = {folders[stage] for stage in stages}
    for folder in {"inputs", "evals", *folders.values()} - made:
        shutil.copytree(warm / folder, fresh / folder)
    for spec in warm.glob("*/*/spec.json"):
        if spec.relative_to(warm).parts[0] in made:
            (fresh / spec.relative_to(warm)).parent.mkdir(parents=True)
            shutil.copy(spec, fresh / spec.relative_to(warm))
    threads, every = ["--threads", "1"], ["--checkpoint-every", "3"]
    (evaluation,) = fresh.glob("evals/*.json")
    for stage in stages:
        (at,) = (fresh / folders[stage]).glob("*")
        if stage == "evaluate":
            job = ["--spec", evaluation, "--run", at, "--out", at / "eval" / evaluation.name]
            job += [*threads, "--batch-size", "32"]
        else:
            job = ["--spec", at / "spec.json", *threads, *(every if stage != "probe" else [])]
        # paths as Snakemake gives them: a record names its model relative to where the job works
        words = [str(word.relative_to(tmp_path)) if isinstance(word, Path) else word for word in job]
        subprocess.run([sys.executable, "-m", "harness", stage, *words], cwd=tmp_path, check=True)
    assert differences(fresh, warm) == []
    for where, process in ((warm, "worker"), (fresh, "fresh")):
        for stage in stages:
            (record,) = where.glob(STAGES[stage])
            assert json.loads(record.read_text())["provenance"]["process"] == process
    peaks = [_host_peak(where / "runs" / kept) for where in (fresh, warm)]
    assert peaks[1] == pytest.approx(peaks[0], rel=0.05)


def _host_peak(run: Path) -> float:
    peaks: dict[str, float] = json.loads((run / "train.json").read_text())["memory"]["host_peak_bytes"]
    return max(peaks.values())


def test_a_second_snakemake_in_one_folder_is_refused(study: Study) -> None:
    lock = try_lock(study.folder / ".snakemake" / "study.lock")
    assert lock is not None
    before = study.results()
    try:
        refused = study.snakemake("--forcerun", "page")
    finally:
        os.close(lock)
    assert refused.returncode != 0
    assert f"another Snakemake works in this folder: process {os.getpid()} since " in refused.stderr
    assert study.results() == before


def test_an_edited_config_adds_runs_and_touches_none(study: Study) -> None:
    text = study.config.read_text()
    before = study.results()
    try:
        study.config.write_text(text.replace("full: {module: full, lr: 1.0e-3}", "full: {module: full, lr: 2.0e-3}"))
        plan = study.snakemake("-n")
        # one training run and its score; everything trained before stays as it is
        assert re.search(r"train +1\n", plan.stdout + plan.stderr), plan.stdout + plan.stderr
        assert not re.search(r"(search|pretrain|prefetch_rows) +\d", plan.stdout + plan.stderr)
    finally:
        study.config.write_text(text)
    assert study.results() == before


def test_a_failed_job_leaves_the_others_their_tables(study: Study) -> None:
    text = study.config.read_text()
    out = study.folder / "results" / "micro" / "partial"
    before = study.results()
    try:
        cut = "  cut: {module: full, lr: 1.0e-3, recipe: {max_length: 2}}\nrecipe:\n"
        study.config.write_text(text.replace("recipe:\n", cut, 1))
        failed = study.snakemake()
        assert failed.returncode != 0
        assert "4 of 5 runs are there: results/micro/partial/report.html" in failed.stderr
        assert re.search(
            r"^missing: mini--arithmetic--cut--seed0--\w+: train failed: .*max_length 2", failed.stderr, re.M
        )
        (row,) = _rows(out / "tables" / "runs.csv", "cut")
        assert row["status"] == "failed"
    finally:
        study.config.write_text(text)
    assert {name: study.results()[name] for name in before} == before
    assert study.snakemake("--forcerun", "page").returncode == 0
    assert not out.exists()


def _rows(table: Path, method: str) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["method"] == method]


def _holds(table: Path, method: str, column: str, value: float) -> bool:
    """Whether the only row of `method` has this number in `column`."""
    (row,) = _rows(table, method)
    return abs(float(row[column]) - value) <= 1e-6 * max(1.0, abs(value))


def test_a_study_that_cannot_fit_on_the_disk_is_refused_before_any_job(tmp_path: Path) -> None:
    study = Study(tmp_path)
    text = study.config.read_text()
    assert text.count("layers: 4, width: 32, heads: 4") == 1
    study.config.write_text(text.replace("layers: 4, width: 32, heads: 4", "layers: 4000, width: 65536, heads: 4"))
    told, refused = study.snakemake("-n"), study.snakemake()
    assert (told.returncode, refused.returncode) == (0, 1)
    assert "this would be refused: micro: too little disk: up to " in told.stderr
    (line,) = [line for line in refused.stderr.splitlines() if "too little disk" in line]
    assert re.match(r"micro: too little disk: up to [\d,.]+ GiB to come \(.*\), and [\d,.]+ GiB are free; ", line)
    assert not list((study.folder / "results").rglob("manifest.json"))
    # a target that writes no model is not refused
    rows = study.snakemake("--until", "prefetch_rows")
    assert rows.returncode == 0, rows.stderr
    assert len(list((study.folder / "results" / "inputs" / "rows").rglob("manifest.json"))) == 1
