"""A table never holds runs of two models under one name."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.errors import UserError
from harness.records.atomic import write_json
from harness.records.inputs import ModelRecord
from harness.records.provenance import provenance
from harness.records.record import Provenance
from harness.reporting.collecting import OneModelEach
from harness.study.jobs import MODEL
from harness.study.paths import Paths
from harness.study.plan import Plan, resolve_study
from study_files import load


def made_from(**hashes: str) -> Provenance:
    empty = provenance(roots=(), inputs={})
    return empty.model_copy(update={"input_sha256": {f"model {k}.bin": v for k, v in hashes.items()} | {"rows": "0"}})


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return resolve_study(load(tmp_path))


def test_the_manifest_decides(plan: Plan, tmp_path: Path) -> None:
    paths, (name,) = Paths(tmp_path), plan.models
    manifest = paths.output(MODEL, name)
    record = ModelRecord(
        name=name, folder="m", files_sha256={"w.bin": "1", "c.bin": "2"}, parameters=1, wall_s=0.0,
        provenance=made_from(),
    )  # fmt: skip
    write_json(manifest, record.model_dump(mode="json"))
    held = OneModelEach(plan, paths)
    held.check(name, made_from(w="1"), Path("older/train.json"))
    held.check(name, made_from(w="1", c="2", more="3"), Path("newer/train.json"))
    with pytest.raises(UserError) as caught:
        held.check(name, made_from(w="1", c="4"), Path("other/train.json"))
    assert str(caught.value) == (
        f"other/train.json: made from another model than {manifest} (c.bin differs), and one table must not mix two; "
        "remove other/train.json and run again"
    )


def test_without_a_manifest_the_first_record_does(plan: Plan, tmp_path: Path) -> None:
    held, (name,) = OneModelEach(plan, Paths(tmp_path)), plan.models
    held.check(name, made_from(w="1"), Path("one/train.json"))
    held.check(name, made_from(), Path("skipped/train.json"))
    with pytest.raises(UserError, match=r"^two/train\.json: made from another model than one/train\.json"):
        held.check(name, made_from(w="2"), Path("two/train.json"))
