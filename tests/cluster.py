"""A whole study through a stand-in for SLURM, one job preempted, one failing: `python -m tests.cluster`, 15 minutes.

The same study on this machine alone is what it must end like.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "support")]

from kills import DEADLINE_S, differences  # noqa: E402
from slurm import Job, install, jobs  # noqa: E402

pytest.importorskip("snakemake_executor_plugin_slurm", reason="needs snakemake-executor-plugin-slurm")

CUT = "  cut: {module: full, lr: 1.0e-3, recipe: {max_length: 2}}\n"
"""A method whose training fails: no row fits."""


class Study:
    """A working folder, with spaces in its name, and Snakemake on it."""

    def __init__(self, folder: Path, *words: str, environment: dict[str, str] | None = None) -> None:
        self.folder, self.config, self.environment = folder, folder / "my study.yaml", environment
        folder.mkdir()
        text = (ROOT / "tests" / "pipeline" / "micro.yaml").read_text(encoding="utf-8")
        # steps enough that a job is preempted between the first resume state and the last step
        self.text = text.replace("{steps: 12,", "{steps: 40,").replace("recipe:\n", f"{CUT}recipe:\n", 1)
        self.config.write_text(self.text, encoding="utf-8")
        self.command = [
            sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--directory", str(folder),
            "--config", f"STUDY={self.config}", *words,
        ]  # fmt: skip

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*self.command, *words], cwd=ROOT, text=True, env=self.environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip


def wait(process: subprocess.Popen[str], there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not there():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def job_of(queue: Path, words: str) -> Job:
    """The last job whose comment, which names rule and wildcards, has `words`."""
    return [job for job in jobs(queue) if words in job.options["comment"]][-1]


def test_a_study_on_the_stand_in_ends_as_one_on_this_machine(tmp_path: Path) -> None:
    alone = Study(tmp_path / "alone", "--cores", "2")
    said, _ = alone.start().communicate()
    assert "4 of 5 runs are there" in said, said[-3000:]

    environment = install(tmp_path / "slurm")
    queue = tmp_path / "slurm" / "queue"
    cluster = Study(
        tmp_path / "on a cluster", "--profile", "profiles/slurm", "--latency-wait", "5", "--slurm-keep-successful-logs",
        "--slurm-init-seconds-before-status-checks", "1", environment=environment,
    )  # fmt: skip
    process = cluster.start()
    # jobs that start later read the study as it was when it began
    wait(process, lambda: any(job.facts["state"] == "RUNNING" for job in jobs(queue)))
    cluster.config.write_text("not a study\n", encoding="utf-8")
    results = cluster.folder / "results"
    wait(process, lambda: any(results.glob("state/mini--arithmetic--full--*/step*.json")))
    preempted = job_of(queue, "rule_train_wildcards_mini--arithmetic--full")
    preempted.end(preempted=True)
    wait(process, lambda: any(results.glob("runs/*--full--*/train.json")))
    cluster.config.write_text(cluster.text, encoding="utf-8")
    said, _ = process.communicate(timeout=1200)
    assert process.returncode != 0, "one job fails"
    assert "4 of 5 runs are there" in said, said[-3000:]

    # the preempted job was requeued under its number, and went on from its saved step
    assert (preempted.facts["starts"], preempted.facts["state"]) == (2, "COMPLETED")
    (log,) = cluster.folder.glob(f".snakemake/slurm_logs/*/*/{preempted.number}.log")
    assert "stopped by SIGTERM; the same command again goes on from here" in log.read_text()
    assert len([job for job in jobs(queue) if "--full--" in job.options["comment"]]) == 2, "one training, one scoring"
    # the failed one was submitted again as often as the profile says
    failed = [job for job in jobs(queue) if "--cut--" in job.options["comment"]]
    assert [job.facts["state"] for job in failed] == ["FAILED"] * 3
    (cut,) = results.glob("runs/*--cut--*")
    unscored = [f"{cut.name}: never scored"]
    assert differences(alone.folder / "results", results) == unscored

    # without the failing method: the same page and tables; the scores of trained runs are one job
    for study in (alone, cluster):
        study.config.write_text(study.text.replace(CUT, ""), encoding="utf-8")
    for score in results.glob("runs/*/eval/*"):
        score.unlink()
    before = len(jobs(queue))
    assert alone.start().wait(600) == 0
    process = cluster.start()
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said[-3000:]
    assert [job.options["comment"] for job in jobs(queue)[before:]] == ["rule_scores_evaluate"]
    assert differences(alone.folder / "results", results) == unscored
    same = [study.folder / "results" / "micro" / "tables" / "accuracy.csv" for study in (alone, cluster)]
    assert same[0].read_bytes() == same[1].read_bytes()
    assert (results / "micro" / "report.html").is_file()
    assert {job.facts["state"] for job in jobs(queue)} == {"COMPLETED", "FAILED"}


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(pytest.main([__file__, "-x", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
