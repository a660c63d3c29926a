"""Records read back: what is damaged or none of ours is named, with what is wrong and the mend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from harness.errors import UserError
from harness.records.atomic import write_json, write_jsonl
from harness.records.inputs import ModelRecord
from harness.records.reading import Stamp, read, read_json, read_jsonl
from harness.records.record import SCHEMA_VERSION
from harness.records.run import EvalRecord, SearchRecord, TrainRecord
from house import ROOT

PUBLISHED = ROOT / "results" / "published"
MANIFEST: dict[str, Any] = {
    "name": "m",
    "folder": "f",
    "files_sha256": {},
    "parameters": 3,
    "wall_s": 1.0,
    "provenance": {
        "schema_version": SCHEMA_VERSION, "source_sha256": "0", "git_commit": None, "git_dirty": None, "packages": {},
        "python": "3", "platform": "p", "device": "cpu", "threads": 1, "started_utc": "now", "input_sha256": {},
    },
}  # fmt: skip


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    write_json(path, MANIFEST)
    assert read(path, ModelRecord) == ModelRecord.model_validate(MANIFEST)
    assert read(path, Stamp).provenance.source_sha256 == "0"
    assert read_json(path) == MANIFEST
    rows = [{"text": "one\u2028line"}, {"text": "two"}]
    write_jsonl(tmp_path / "steps.jsonl", rows)
    assert read_jsonl(tmp_path / "steps.jsonl") == rows


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not JSON (EOF while parsing a value at line 1 column 0)"),
        (json.dumps(MANIFEST)[:50], "not JSON (EOF while parsing"),
        (json.dumps({k: v for k, v in MANIFEST.items() if k != "folder"}), "the key folder is missing"),
        (json.dumps(MANIFEST | {"fodler": "x"}), "unknown key fodler"),
        (json.dumps({("fodler" if k == "folder" else k): v for k, v in MANIFEST.items()}), "unknown key fodler"),
        (json.dumps(MANIFEST | {"wall_s": "long"}), "wall_s: Input should be a valid number"),
        ("[1]", "Input should be an object"),
        (
            json.dumps(MANIFEST | {"new": 1, "provenance": MANIFEST["provenance"] | {"schema_version": 9}}),
            f"written by schema version 9, and this program reads version {SCHEMA_VERSION}",
        ),
    ],
)
def test_a_damaged_or_foreign_record_is_named(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read(path, ModelRecord)
    said = str(caught.value)
    assert said.startswith(f"{path}: {complaint}")
    assert said.endswith("; if this is the file that is meant, delete it and run again")
    assert "\n" not in said


def test_a_missing_file_and_a_damaged_line_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.json: no such file; correct the path, or run the job that writes it"):
        read(tmp_path / "gone.json", ModelRecord)
    (tmp_path / "steps.jsonl").write_text('{"a": 1}\n{"a"', encoding="utf-8")
    with pytest.raises(
        UserError, match=r"steps\.jsonl, line 2: not JSON .*; delete the record beside it and run again"
    ):
        read_jsonl(tmp_path / "steps.jsonl")
    (tmp_path / "tables.json").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match=r"tables\.json: not JSON"):
        read_json(tmp_path / "tables.json")


def test_every_published_record_is_read() -> None:
    models = {"train.json": TrainRecord, "search.json": SearchRecord}
    found = [path for path in PUBLISHED.rglob("*.json") if path.name in models or path.parent.name == "eval"]
    assert found
    for path in found:
        assert read(path, models.get(path.name, EvalRecord))
