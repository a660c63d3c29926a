"""The progress line of a study's jobs says what is done, and does not resolve the study for it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from harness.study import config, plan, progress
from harness.study.jobs import TRAIN
from harness.study.paths import Paths
from harness.study.plan import outputs, resolve_study
from study_files import load


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study of which the first run is done, as the Snakefile tells its jobs of it."""
    resolved, paths = resolve_study(load(tmp_path)), Paths(tmp_path / "results")
    file = tmp_path / "mine.work"
    progress.write_work(resolved, paths, file)
    monkeypatch.setenv(progress.STUDY_WORK, str(file))
    monkeypatch.setenv(progress.STUDY_STARTED, str(time.time() - 90))
    monkeypatch.setenv(progress.STUDY_DONE, "0")
    run = next(output for output in outputs(resolved, paths) if output.kind is TRAIN)
    run.path.parent.mkdir(parents=True)
    run.path.touch()
    total = sum(output.weight for output in outputs(resolved, paths))
    assert progress.read_work(file) == (run.weight, pytest.approx(total))
    return file


def test_a_line_reads_the_list_and_resolves_nothing(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def resolved(*_: object, **__: object) -> None:
        raise AssertionError("the study was resolved for a progress line")

    for module, name in ((plan, "resolve_study"), (config, "load_study"), (plan, "outputs"), (progress, "outputs")):
        monkeypatch.setattr(module, name, resolved)
    done, total = progress.read_work(work)
    progress.announce("train it: ok")
    said = capsys.readouterr().err
    assert said.startswith(f"[{done / total:4.0%}, 1 min 30 s gone, about ")
    assert said.endswith(" left] train it: ok\n")


def test_a_list_that_was_removed_fails_no_job(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work.unlink()
    progress.announce("train it: ok")
    assert capsys.readouterr().err == "train it: ok\n"
