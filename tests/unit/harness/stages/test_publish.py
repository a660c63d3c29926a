"""Publishing: what a finished study leaves in results/published/, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import study_files
from harness.__main__ import main
from harness.study.jobs import KINDS
from harness.study.paths import Paths
from harness.study.plan import open_study, outputs


def test_a_finished_study_is_copied_with_every_record_and_its_spec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config, paths = study_files.written(tmp_path), Paths()
    plan = open_study(config, paths)
    listed = outputs(plan, paths)
    assert {output.kind for output in listed} == {kind for kind in KINDS if kind.name not in {"forecast", "probe"}}
    for output in listed[1:]:
        output.path.parent.mkdir(parents=True, exist_ok=True)
        output.path.write_text("{}")
    made = paths.study("mine")
    made.mkdir()
    (made / "report.html").write_text("page")
    arguments = ["publish", "--config", str(config)]
    assert main(arguments) == 2
    assert "mine is not finished (1 records and specs missing)" in capsys.readouterr().err
    partial = made / "partial"
    partial.mkdir()
    (partial / "report.html").write_text("what is there")
    assert main([*arguments, "--partial"]) == 0
    published = tmp_path / "results" / "published" / "mine"
    assert (published / "report.html").read_text() == "what is there"
    assert f"({len(listed) - 1} of {len(listed)} records)" in capsys.readouterr().out
    there = [(published / "records" / output.path.relative_to(paths.root)).is_file() for output in listed]
    assert there == [False, *[True] * (len(listed) - 1)]
    (partial / "report.html").unlink()
    partial.rmdir()

    listed[0].path.write_text("{}")
    (made / "figures").mkdir()
    (made / "tables").mkdir()
    assert main(arguments) == 0
    for output in listed:
        for path in (output.path, paths.spec(output.kind, output.job.name)):
            assert (published / "records" / path.relative_to(paths.root)).is_file()
    assert (published / "report.html").read_text() == "page"
    assert (published / "study.yaml").read_text() == config.read_text()
    listed[0].path.write_text(f'{{"folder": "{tmp_path}"}}')
    assert main(arguments) == 2
    assert f"names {tmp_path}: give paths through a variable" in capsys.readouterr().err
