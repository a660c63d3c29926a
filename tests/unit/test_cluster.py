"""What a cluster is asked for, by the sbatch lines of a stand-in that notes jobs and refuses them. `python -m
tests.cluster` runs a whole study.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.records.atomic import write_json
from harness.records.inputs import ModelRecord
from harness.records.provenance import provenance
from harness.records.run import RunForecast
from harness.records.units import GIB
from harness.study.config import load_study
from harness.study.jobs import FORECAST, MODEL, ROWS, SUITE, TRAIN
from harness.study.needs import SMALL, of_training
from harness.study.paths import Paths
from harness.study.plan import Plan, resolve_study
from house import ROOT
from slurm import install, jobs
from study_files import written

pytest.importorskip("snakemake_executor_plugin_slurm", reason="needs snakemake-executor-plugin-slurm")
METHODS = (
    "  full: {module: full}\n",
    "  full: {module: full, lr: 1.0e-3}\n"
    "  lisa: {module: lisa, lr: 1.0e-3, options: {active_layers: 1, sample_every: 3}}\n",
)
ON_GPU = "  schedule: linear\n", "  schedule: linear\n  device: cuda\n"


@dataclass(frozen=True)
class Asked:
    """A study whose jobs were refused."""

    folder: Path
    config: Path
    plan: Plan
    paths: Paths
    environment: dict[str, str]
    lines: list[dict[str, str]]
    """Options of the sbatch lines."""


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Options of all jobs of a study whose inputs are there; one method has its forecast, another is trained."""
    folder = tmp_path_factory.mktemp("a study")
    config = written(folder, METHODS, ON_GPU)
    plan, paths = resolve_study(load_study(config)), Paths(folder / "results")
    for name in plan.models:
        (folder / "model").mkdir()
        record = ModelRecord(
            name=name, folder=str(folder / "model"), files_sha256={}, parameters=1_000_000_000, wall_s=0.0,
            provenance=provenance(roots=(), inputs={}),
        )  # fmt: skip
        write_json(paths.output(MODEL, name), record.model_dump(mode="json"))
    made = [paths.output(ROWS, name) for name in plan.rows] + [paths.output(SUITE, name) for name in plan.suites]
    (folder / "cards.yaml").write_text("large: 80GiB\nhuge: 141GiB\nsmall: 24 GiB\n", encoding="utf-8")
    for path in (*made, *(paths.output(TRAIN, name) for name in plan.runs if "--fixed--" in name)):
        write_json(path, {})
    for name in plan.forecasts:
        if "--full--" in name:
            forecast = RunForecast(
                name=name, longest_row_tokens=8, peak_bytes=29 * GIB, peak_phase="step", needed_bytes=30 * GIB,
                peak_why=None, provenance=provenance(roots=(), inputs={}),
            )  # fmt: skip
            write_json(paths.output(FORECAST, name), forecast.model_dump(mode="json"))
    profile = (ROOT / "profiles" / "slurm" / "config.yaml").read_text(encoding="utf-8")
    for line, value in (
        ("# slurm_account: <account>", "slurm_account: mine"),
        ("# slurm_partition: <partition>", "slurm_partition: cards"),
    ):
        assert profile.count(line) == 1
        profile = profile.replace(line, value)
    (folder / "profile").mkdir()
    (folder / "profile" / "config.yaml").write_text(profile, encoding="utf-8")
    environment = install(folder / "slurm", refusing=True)
    said = folder / "said"
    with said.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--directory", str(folder), "--profile",
             str(folder / "profile"), "--retries", "0", "--slurm-init-seconds-before-status-checks", "1",
             "--config", f"STUDY={config}", f"CARDS={folder / 'cards.yaml'}"],
            stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=ROOT,
        )  # fmt: skip
    while process.poll() is None and "Exiting because a job execution failed" not in said.read_text():
        time.sleep(0.2)
    process.kill()  # it would sleep for a minute before it looked at jobs that were never taken
    process.wait()
    found = jobs(folder / "slurm" / "queue")
    assert len(found) == 4, said.read_text()[-3000:]
    return Asked(folder, config, plan, paths, environment, [job.options for job in found])


def named(asked: Asked, comment: str) -> list[dict[str, str]]:
    return [options for options in asked.lines if options["comment"].startswith(comment)]


def test_a_training_asks_for_a_gpu_and_what_it_needs_and_saves_when_it_is_preempted(asked: Asked) -> None:
    lines = named(asked, "rule_train_")
    assert len(lines) == 2, "one a seed"
    run = next(run for run in asked.plan.runs.values() if run.training.label == "full")
    needs = of_training(run.training, asked.paths)
    for line in lines:
        assert (line["gpus"], line["mem"], line["time"]) == ("1", str(needs.mem_mb), str(needs.minutes))
        assert (line["account"], line["partition"]) == ("mine", "cards")
        assert line["constraint"] == "large", "the smallest card that has what the forecast says"
        assert "CARDS=" in line["wrap"]
        assert (line["signal"], line["open-mode"], line["requeue"]) == ("TERM@120", "append", "")
        assert line["wrap"].startswith("trap : TERM && ")


def test_short_jobs_are_submitted_together_and_ask_for_one_after_the_other(asked: Asked) -> None:
    (forecasts,) = named(asked, "rule_forecasts_")
    assert len(asked.plan.forecasts) == 4, "two are there, the others are one job"
    assert forecasts["wrap"].count("forecast:forecast=") == 2
    assert (forecasts["time"], forecasts["mem"]) == (str(2 * SMALL.minutes), str(SMALL.mem_mb))
    assert "gpus" not in forecasts, "a forecast needs no GPU"
    (scores,) = named(asked, "rule_scores_")
    assert scores["wrap"].count("evaluate:run=") == 2, "both seeds of the run that is trained"
    assert (scores["gpus"], scores["cpus-per-task"]) == ("1", "1")


def test_nothing_else_is_submitted(asked: Asked) -> None:
    assert len(asked.lines) == 4


def test_a_job_reads_the_study_as_it_was_and_writes_no_spec(asked: Asked) -> None:
    (copy,) = (asked.folder / ".snakemake" / "studies").iterdir()
    assert copy.read_bytes() == asked.config.read_bytes()
    (spec,) = (asked.paths.spec(FORECAST, name) for name in asked.plan.forecasts if "--lisa--" in name)
    kept = spec.read_bytes()
    spec.unlink()
    asked.config.write_text("study: [edited meanwhile", encoding="utf-8")
    job = named(asked, "rule_train_")[0]["wrap"].removeprefix("trap : TERM && ")
    # it ends before training, at a file that it is to wait for
    ended = subprocess.run(
        f"{job} --wait-for-files nowhere --latency-wait 0", shell=True, cwd=asked.folder, env=asked.environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert "nowhere" in ended.stderr, ended.stderr[-2000:]
    assert not spec.exists()
    spec.write_bytes(kept)
