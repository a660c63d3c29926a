"""`python -m harness train --gpus 2`: torchrun, two processes, one record; stopped by SIGTERM, and resumed."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import study_files
from harness.__main__ import main
from harness.checking.tiny import tiny_inputs
from harness.records.reading import read
from harness.records.run import TrainRecord
from harness.step import resume
from harness.study.jobs import MODEL, ROWS, TRAIN
from harness.study.paths import Paths
from harness.study.plan import Plan, open_study
from harness.training import launching, ranks

from baselines.full import Full

DEADLINE_S = 400


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A study with its inputs made, in the working folder."""
    monkeypatch.chdir(tmp_path)
    tiny_inputs(tmp_path / "tiny")
    (model,) = re.findall(r"  tiny:\n(?:    .*\n)+", study_files.STUDY)
    edits = [
        (model, f"  tiny: {{kind: local, path: {tmp_path / 'tiny' / 'model'}}}\n"),
        ("    recipe: {steps: 12}\n", "    recipe: {steps: 60}\n"),
        ("  fixed: {module: full, lr: 1.0e-3}\n", "  fixed: {module: full, lr: 1.0e-3, seeds: [0], gpus: 2}\n"),
    ]
    found = open_study(study_files.written(tmp_path, *edits), Paths())
    for kind, what in ((MODEL, "model"), (ROWS, "rows")):
        for name in found.jobs(kind):
            assert main(["prefetch", what, "--spec", str(Paths().spec(kind, name))]) == 0
    return found


@pytest.mark.parametrize("then", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_two_processes_are_stopped_by_sigterm_and_go_on(then: int, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    (run,) = [name for name in plan.runs if "--fixed--" in name]
    state, log = Paths().state(run), Path("train.log")

    def train(processes: int) -> int:
        given = ["--spec", str(Paths().spec(TRAIN, run)), "--log", str(log), "--checkpoint-every", "1"]
        return main(["train", *given, "--threads", str(processes), "--gpus", str(processes)])

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))

    def end_it() -> None:
        started = time.monotonic()
        while time.monotonic() - started < DEADLINE_S:
            if resume.manifests(state):
                os.kill(os.getpid(), signal.SIGTERM)
                return
            time.sleep(0.02)

    usual = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    threading.Thread(target=end_it, daemon=True).start()
    try:
        assert train(2) == 128 + signal.SIGTERM
        said = log.read_text()
        (stopped,) = re.findall(rf"\[rank 0\] {run}, after step (\d+): stopped by SIGTERM", said)
        assert "Traceback" not in said
        assert "[rank 1]" not in said, "rank 0 alone speaks"
        assert not Paths().output(TRAIN, run).exists()
        assert train(then) == 0, log.read_text()
    finally:
        # torchrun leaves its own
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), usual, strict=True):
            signal.signal(number, handler)
    record = read(Paths().output(TRAIN, run), TrainRecord)
    assert (record.status, record.processes, record.steps_done) == ("ok", then, 60)
    assert f"resumed after step {stopped}" in record.notes
    # a record from before several processes could train a run
    old = {k: v for k, v in record.model_dump(mode="json").items() if k != "processes" and not k.startswith("rank_")}
    assert TrainRecord.model_validate(old).processes == 1


def test_one_process_without_memory_is_the_runs_outcome(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rank fails with it, by a closed connection, and hands over no record."""
    (run,) = [name for name in plan.runs if "--fixed--" in name]
    spec, given = Paths().spec(TRAIN, run), ["--threads", "1", "--checkpoint-every", "9", "--gpus", "2"]

    def out_of_memory(*_: object, **__: object) -> None:
        raise MemoryError

    def fails(words: list[str], *, processes: int) -> int:
        """Rank 1 alone, in this process."""
        assert processes == 2
        with monkeypatch.context() as patch:
            patch.setenv("RANK", "1")
            patch.setattr(ranks, "group", lambda device: nullcontext())
            patch.setattr(Full, "end_step", out_of_memory)
            with pytest.raises(SystemExit) as ended:
                main(words[2:])
        return int(str(ended.value.code))

    monkeypatch.setattr(launching, "launch", fails)
    assert main(["train", "--spec", str(spec), *given]) == 0
    record = json.loads(Paths().output(TRAIN, run).read_text())
    assert (record["status"], record["status_why"]) == ("oom", "in phase first_step: host memory")
    monkeypatch.setattr(launching, "launch", lambda words, *, processes: 1)
    Paths().output(TRAIN, run).unlink()
    assert main(["train", "--spec", str(spec), *given]) == 1, "an error that is no outcome"
    assert not Paths().output(TRAIN, run).exists()
