"""Models are known by what lies in their folder: one that was exchanged is noticed, and no table mixes two."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from harness.__main__ import main
from harness.errors import UserError
from harness.records.atomic import sha256, write_json
from harness.records.inputs import ModelRecord
from harness.records.provenance import provenance
from harness.records.reading import read
from harness.study import identity
from harness.study.identity import changed_file, files_of, known_model, replaced_models, stamp_files
from harness.study.jobs import MODEL, TRAIN
from harness.study.paths import Paths
from harness.study.plan import open_study, outputs, resolve_study
from harness.study.stale import current
from study_files import STUDY, load, written

PRETRAIN = STUDY[STUDY.index("  tiny:\n") : STUDY.index("tasks:\n")]
LOCAL = '  tiny: {kind: local, path: "${A_MODEL}"}\n'
FILES = {"config.json": "{}", "pytorch_model.bin": "weights", "tokenizer.json": "[]", "chat_template.jinja": "{{}}"}


def given(folder: Path, **changes: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in {**FILES, **changes}.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def recorded(model: Path, manifest: Path, *, text: str = "${A_MODEL}") -> ModelRecord:
    """The manifest that prefetch writes."""
    files = files_of(model)
    stamp_files(files, manifest.parent)
    record = ModelRecord(
        name=manifest.parent.name, folder=text, files_sha256={file.name: sha256(file) for file in files},
        parameters=1, wall_s=0.0, provenance=provenance(roots=(), inputs={}),
    )  # fmt: skip
    write_json(manifest, record.model_dump(mode="json"))
    return record


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("A_MODEL", str(tmp_path / "a"))
    return given(tmp_path / "a")


@pytest.fixture
def manifest(model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "results" / "inputs" / "models" / "tiny--12345678" / "manifest.json"
    recorded(model, path)
    return path


def test_a_model_that_nobody_touched_is_not_read_again(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> str:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(identity, "sha256", read)
    assert known_model(manifest).name == "tiny--12345678"


@pytest.mark.parametrize("name", sorted(FILES))
def test_content_of_the_same_size_and_time_is_noticed(model: Path, manifest: Path, name: str) -> None:
    file = model / name
    before = file.stat()
    file.write_text("x" * before.st_size, encoding="utf-8")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match=f"made from: {name} differs; ") as caught:
        known_model(manifest)
    said = str(caught.value)
    assert said.startswith(f"${{A_MODEL}}, now {model}, holds another model than {manifest} was made from: ")
    assert said.endswith(
        f"or remove {manifest.parent} and {manifest.parents[3]}/runs/tiny--* to make everything from it anew"
    )


def test_a_file_that_comes_or_goes_makes_another_model(model: Path, manifest: Path) -> None:
    """Weights in model.safetensors are taken before those in pytorch_model.bin."""
    (model / "model.safetensors").write_text("other weights", encoding="utf-8")
    assert list(replaced_models([manifest])) == [manifest]
    (model / "model.safetensors").unlink()
    assert not replaced_models([manifest])
    (model / "chat_template.jinja").unlink()
    assert list(replaced_models([manifest])) == [manifest]


def test_the_same_model_elsewhere_is_the_same_and_is_read_once(
    model: Path, manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(model, tmp_path / "b")
    monkeypatch.setenv("A_MODEL", str(tmp_path / "b"))
    read: list[Path] = []
    monkeypatch.setattr(identity, "sha256", lambda path: read.append(path) or sha256(path))
    stamps = (manifest.parent / "stamps.json").read_bytes()
    assert not replaced_models([manifest], dry_run=True)
    assert (manifest.parent / "stamps.json").read_bytes() == stamps, "a dry run wrote something"
    read.clear()
    for _ in range(2):
        known_model(manifest)
    assert len(read) == len(FILES)


def test_what_is_not_there_is_left_to_the_job_that_needs_it(
    model: Path, manifest: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(model)
    assert not replaced_models([manifest, manifest.parent / "none.json"])
    monkeypatch.delenv("A_MODEL")
    assert not replaced_models([manifest])
    with pytest.raises(UserError, match="A_MODEL is not set"):
        known_model(manifest)


def test_damaged_stamps_cost_a_reading_and_nothing_else(model: Path, manifest: Path) -> None:
    (manifest.parent / "stamps.json").write_text("[", encoding="utf-8")
    assert known_model(manifest)
    (manifest.parent / "stamps.json").unlink()
    (model / "config.json").write_text("{ }", encoding="utf-8")
    record = read(manifest, ModelRecord)
    assert changed_file(record, manifest.parent) == "config.json"


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_study_whose_model_was_exchanged_does_not_start(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    paths, edits = Paths(tmp_path / "results"), ((PRETRAIN, LOCAL),)
    (name,) = resolve_study(load(tmp_path, *edits)).models
    recorded(model, paths.output(MODEL, name))
    config = written(tmp_path, *edits)
    open_study(config, paths, dry_run=dry_run)
    monkeypatch.setenv("A_MODEL", str(given(tmp_path / "b", **{"pytorch_model.bin": "WEIGHTS"})))
    with pytest.raises(UserError, match=r"now .*/b, holds another model than .*: pytorch_model\.bin differs"):
        open_study(config, paths, dry_run=dry_run)


def test_plan_marks_what_was_made_from_the_model_that_was_there(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    paths, config = Paths(), written(tmp_path, (PRETRAIN, LOCAL))
    plan = open_study(config, paths)
    (name,) = plan.models
    recorded(model, paths.output(MODEL, name))
    run = next(output for output in outputs(plan, paths) if output.kind is TRAIN)
    write_json(run.path, {"status": "ok", "provenance": {"source_sha256": current(run).sha256}})
    (model / "config.json").write_text("[]", encoding="utf-8")
    assert main(["plan", "--config", str(config)]) == 0
    shown = capsys.readouterr().out
    assert f"  other  train    ok         {run.name}\n" in shown
    assert f"  other: ${{A_MODEL}}, now {model}, holds another model than {paths.output(MODEL, name)} was made" in shown


def test_a_mirror_without_the_model_is_named_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, hub = Paths(tmp_path / "results"), "  tiny: {kind: hub, repo: org/name, revision: main}\n"
    config = written(tmp_path, (PRETRAIN, hub))
    monkeypatch.delenv("MIRROR", raising=False)
    (name,) = open_study(config, paths).models
    monkeypatch.setenv("MIRROR", str(tmp_path / "mirror"))
    with pytest.raises(UserError) as caught:
        open_study(config, paths)
    assert str(caught.value) == (
        f"{config}: models.tiny: MIRROR={tmp_path}/mirror has no folder org/name; put the model there (hf download "
        f"org/name --local-dir {tmp_path}/mirror/org/name), or leave MIRROR out to fetch it from the hub"
    )
    open_study(config, paths, dry_run=True)
    recorded(given(tmp_path / "fetched"), paths.output(MODEL, name), text=str(tmp_path / "fetched"))
    open_study(config, paths)  # it came over the network before
