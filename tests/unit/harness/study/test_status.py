"""Status is read from what jobs leave, in whatever state it is, and changes none of it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from harness.records.locks import lock_of, try_lock
from harness.sign import sign_of
from harness.study.jobs import EVALUATE, MODEL, SEARCH, TRAIN
from harness.study.last_words import log_of, rule_of
from harness.study.paths import Paths
from harness.study.plan import Output, Plan, outputs, resolve_study
from harness.study.status import Reader, Status, doing, seconds_left, snakemake_here
from study_files import load

ME = {"pid": os.getpid(), "host": socket.gethostname()}
ELSEWHERE = {"pid": 1, "host": "another-machine"}


class Folder:
    """A study that has not begun."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "results"
        self.plan: Plan = resolve_study(load(folder))
        self.paths = Paths(self.root)
        self.outputs = outputs(self.plan, self.paths)
        self.reader = Reader(self.plan, self.paths)

    def first(self, kind: Any) -> Output:
        return next(output for output in self.outputs if output.kind is kind)

    def put(self, path: Path, text: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    def sign(self, output: Output, **facts: Any) -> Path:
        return self.put(sign_of(output.path), json.dumps(facts))

    def log(self, output: Output, text: str) -> Path:
        return self.put(log_of(self.paths, *rule_of(self.plan, output)), text)

    def status(self) -> Status:
        return self.reader.status()


@pytest.fixture
def study(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture
def dead() -> int:
    """Number of a process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_nothing_is_there(study: Folder) -> None:
    found = study.status()
    assert found.total == {"inputs": 4, "search": 2, "train": 6, "evaluate": 6}
    assert found.done.total() == len(found.running) == len(found.failed) == len(found.stopped) == 0
    assert not found.all_done


def test_done_jobs_are_counted_by_stage_and_those_that_are_not_ok_named(study: Folder) -> None:
    for output in study.outputs:
        study.put(output.path, '{"status": "ok"}')
    assert study.status().all_done
    run = study.first(TRAIN)
    study.put(run.path, '{"status": "skipped", "status_why": "needs galore-torch", "loss": 1}')
    os.utime(run.path, (5, 5))
    found = study.status()
    assert found.all_done
    assert [(r.name, r.status, r.why) for r in found.not_ok] == [(run.name, "skipped", "needs galore-torch")]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"status": 3}', "\x00\xff"])
def test_a_record_that_cannot_be_read_is_a_row(study: Folder, text: str) -> None:
    study.put(study.first(TRAIN).path, text)
    (row,) = study.status().not_ok
    assert row.status == "damaged"


def test_a_record_is_read_once(study: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    study.put(study.first(TRAIN).path, '{"status": "diverged"}')
    first = study.status().not_ok
    monkeypatch.setattr("harness.study.status.read", None)
    assert study.status().not_ok == first


# ------------------------------------------------------------ running, or not


def test_a_living_process_of_this_machine_runs_however_old_its_sign(study: Folder) -> None:
    run = study.first(TRAIN)
    path = study.sign(run, **ME, phase="load")
    (job,) = study.status().running
    assert (job.rule, job.name, job.sign.alive) == ("train", run.name, True)
    now = time.time()
    os.utime(path, (now + 500, now + 500))  # of a shared disk whose clock is ahead
    assert study.status().running[0].sign.silent_s == 0


def test_a_number_that_a_later_process_has_is_not_the_jobs(study: Folder) -> None:
    path = study.sign(study.first(TRAIN), **ME, total=9, done=3, unit="step")
    os.utime(path, (1000, 1000))
    found = study.status()
    assert not found.running
    assert found.stopped[0].why == "its process is gone; last sign: step 3 of 9"


def test_a_killed_job_is_told_by_what_it_left(study: Folder, dead: int) -> None:
    run = study.first(TRAIN)
    study.sign(run, pid=dead, host=ME["host"], total=9, done=3, unit="step", note="loss 1.500")
    log = study.log(run, "x: 3/9 steps\n")
    (row,) = study.status().stopped
    assert (row.status, row.log) == ("killed", log)
    assert row.why == "its process is gone; last sign: step 3 of 9, loss 1.500"


def test_of_another_machine_the_age_of_the_sign_is_all_that_is_known(study: Folder) -> None:
    path = study.sign(study.first(TRAIN), **ELSEWHERE)
    old = time.time() - 600
    os.utime(path, (old, old))
    (job,) = study.status().running
    assert job.sign.alive is None
    assert 599 < job.sign.silent_s < 660


def test_a_lock_stands_in_for_a_sign_and_is_not_taken(study: Folder) -> None:
    run = study.first(TRAIN)
    run.path.parent.mkdir(parents=True)
    held = try_lock(lock_of(run.path))
    assert held is not None
    try:
        before = lock_of(run.path).stat()
        (job,) = study.status().running
        assert job.sign.facts["pid"] == os.getpid()
        assert lock_of(run.path).stat() == before
    finally:
        os.close(held)


@pytest.mark.parametrize("text", ["", "{", '{"pid": "x"}', '{"pid": -1}', "[3]", "\x00", '{"pid": true, "host": 3}'])
def test_a_sign_that_cannot_be_read_is_a_job_of_which_nothing_is_known(study: Folder, text: str) -> None:
    study.put(sign_of(study.first(TRAIN).path), text)
    (job,) = study.status().running
    assert job.sign.alive is None
    assert doing(job.sign.facts) == "loading, or at work without steps"


def test_a_done_jobs_left_sign_does_not_count(study: Folder) -> None:
    run = study.first(TRAIN)
    study.sign(run, **ME)
    study.put(run.path, '{"status": "ok"}')
    assert not study.status().running


# ------------------------------------------------------------ failed, or stopped


@pytest.mark.parametrize("kind", [MODEL, SEARCH, TRAIN, EVALUATE])
def test_a_failed_job_has_its_last_words_and_its_log(study: Folder, kind: Any) -> None:
    output = study.first(kind)
    log = study.log(output, "said before\nharness stage: x.csv: no such file; give one\n")
    (row,) = study.status().failed
    assert (row.name, row.log) == (rule_of(study.plan, output)[1], log)
    assert row.why == "harness stage: x.csv: no such file; give one"


def test_a_job_that_runs_again_is_not_failed(study: Folder) -> None:
    run = study.first(TRAIN)
    study.log(run, "harness train: no such file\n")
    study.sign(run, **ME)
    found = study.status()
    assert (len(found.running), found.failed) == (1, [])


def test_a_job_that_was_told_to_end_is_stopped(study: Folder) -> None:
    run = study.first(TRAIN)
    study.log(run, "run, after step 3: stopped by SIGTERM; the same command again goes on from here\n")
    (row,) = study.status().stopped
    assert (row.name, row.status) == (run.name, "stopped")


def test_rules_are_those_of_the_workflow(study: Folder) -> None:
    from house import ROOT

    rules = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "workflow" / "rules").glob("*.smk"))
    for output in study.outputs:
        assert f'"results/logs/{rule_of(study.plan, output)[0]}/' in rules


# ------------------------------------------------------------ in words


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"phase": "load"}, "loading"),
        ({"phase": "eval", "note": "loss 1.500"}, "validating, loss 1.500"),
        ({"phase": "save"}, "exporting"),
        ({"phase": "steps", "total": 9, "done": 0, "unit": "step"}, "step 0 of 9"),
        ({"trial": 2, "trials": 9, "phase": "load"}, "trial 2 of 9, loading"),
        ({"unit": "answer", "label": "evaluate run boolq", "total": 20, "done": 4}, "boolq, answer 4 of 20"),
        ({"total": "x", "done": [], "trial": "a", "phase": ["b"]}, "['b']"),
        ({"total": float("inf")}, "loading, or at work without steps"),
    ],
)
def test_what_a_job_does(facts: dict[str, Any], words: str) -> None:
    assert doing(facts) == words


def test_a_search_has_its_later_trials_to_do_too() -> None:
    facts = {"unit_s": 2.0, "total": 10, "done": 4}
    assert seconds_left(facts) == 12
    assert seconds_left({**facts, "trial": 2, "trials": 3}) == 12 + 20
    assert seconds_left({"total": 10, "done": 4}) is None


def test_snakemake_is_known_by_its_lock(tmp_path: Path, dead: int) -> None:
    folder = tmp_path / ".snakemake"
    assert snakemake_here(folder) is None
    folder.mkdir()
    assert snakemake_here(folder) is False
    lock = folder / "study.lock"
    for facts, known in ((ME, True), ({**ME, "pid": dead}, False), (ELSEWHERE, None), ({"pid": dead}, None)):
        lock.write_text(json.dumps(facts))
        assert snakemake_here(folder) is known
