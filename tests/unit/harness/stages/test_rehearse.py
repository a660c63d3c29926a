"""`rehearse` as it is typed: models from a folder, from a mirror and pretrained; the file it writes is a study."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from harness.__main__ import main
from harness.checking.tiny import tiny_inputs
from harness.inputs.models import load_model
from harness.study.config import load_study
from house import ROOT


def test_it_writes_a_study_whose_models_can_be_loaded_and_the_command_that_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    mirror = tmp_path / "published"
    for folder in (tmp_path / "here", mirror / "org" / "name"):
        tiny_inputs(folder / "made").model.rename(folder / "model")
    (mirror / "org" / "name" / "model" / "model.safetensors").unlink()  # a configuration and a tokenizer are enough
    for file in (mirror / "org" / "name" / "model").iterdir():
        file.rename(mirror / "org" / "name" / file.name)
    monkeypatch.setenv("MIRROR", str(mirror))
    study = yaml.safe_load((ROOT / "tests" / "pipeline" / "micro.yaml").read_text(encoding="utf-8"))
    study["models"] |= {
        "folder": {"kind": "local", "path": "here/model"},
        "hub": {"kind": "hub", "repo": "org/name", "revision": "main"},
    }
    Path("mine.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    assert main(["rehearse", "--config", "mine.yaml", "--out", "small", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "snakemake --cores 2 --config STUDY=small/micro-rehearsal.yaml MIRROR=small/mirror" in said
    assert "mini: pretrained by the study itself" in said
    made = load_study(Path("small/micro-rehearsal.yaml"))
    assert made.models.keys() == study["models"].keys()
    for folder in ("small/mirror/org/name", "small/models/folder"):
        assert load_model(Path(folder), weight_dtype="bf16")
    assert made.models["folder"].path == "small/models/folder"  # type: ignore[union-attr]


def test_a_model_that_is_not_in_the_mirror_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIRROR", str(tmp_path))
    study = yaml.safe_load((ROOT / "tests" / "pipeline" / "micro.yaml").read_text(encoding="utf-8"))
    study["models"] = {"hub": {"kind": "hub", "repo": "org/name", "revision": "main"}}
    Path("mine.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    assert main(["rehearse", "--config", "mine.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("harness rehearse: ")
    assert "org/name" in line
