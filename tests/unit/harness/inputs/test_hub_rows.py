"""Data sets of the hub, through the real client: from a stand-in for its servers, and from a mirror folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data_hub import CLOSED, OPEN, REVISION, data_hub
from harness.errors import UserError
from harness.inputs.make_rows import make_rows, make_suite
from harness.inputs.rows import read_rows
from harness.records.atomic import sha256
from harness.study.jobs import RowsJob, SuiteJob
from harness.study.sources import Columns, HubRows, HubSuite

COLUMNS = Columns(instruction="q", answer="a")
PROGRAM = """
import json, sys
from pathlib import Path
from harness.errors import UserError
from harness.inputs.make_rows import make_suite
from harness.study.jobs import SuiteJob
for number, text in enumerate(sys.argv[2:]):
    folder = Path(sys.argv[1]) / str(number)
    try:
        make_suite(SuiteJob.model_validate_json(text), folder)
        print(json.dumps(json.loads((folder / "test.json").read_text())))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def suite(**changes: Any) -> HubSuite:
    given = {"repo": OPEN, "config": "main", "split": "test", "revision": REVISION, "columns": COLUMNS}
    return HubSuite(kind="hub", scoring="number", max_new_tokens=8, **given | changes)


def answers(folder: Path, *suites: HubSuite, **environment: str) -> list[Any]:
    """What a process of its own makes of each, since the client reads its settings as it is imported."""
    jobs = [SuiteJob(label="t", source=each).model_dump_json() for each in suites]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MIRROR"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), *jobs],
        env=clean | {"HF_HOME": str(folder / "home")} | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_data_set_comes_from_the_hub_and_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    with data_hub() as address:
        rows, *said = answers(
            tmp_path,
            suite(limit=1),
            suite(split="train"),
            suite(config="socratic"),
            suite(revision="b" * 40),
            suite(repo=CLOSED),
            suite(repo="org/absent"),
            suite(columns=Columns(instruction="question", answer="a")),
            HF_ENDPOINT=address,
        )
    assert rows == [{"instruction": "1 + 1?", "input": "", "output": "2", "answer": "2"}]
    at, other = f"at {REVISION}", "b" * 40
    page = f"https://huggingface.co/datasets/{CLOSED}"
    assert said == [
        f"{OPEN} {at}: Unknown split \"train\". Should be one of ['test']; correct `split`",
        f"{OPEN} {at}: BuilderConfig 'socratic' not found. Available: ['main']; correct `config`",
        f"{OPEN} at {other}: Revision '{other}' doesn't exist for dataset '{OPEN}' on the Hub; correct `revision`",
        f"{CLOSED} {at}: a closed data set; accept its terms on {page} and set HF_TOKEN",
        f"org/absent {at}: not on the hub, or closed to you; correct `repo`, or set HF_TOKEN",
        f"{OPEN} test, row 1: no column 'question', there are 'q', 'a'; correct `columns`",
    ]


def test_without_a_network_the_mirror_is_named(tmp_path: Path) -> None:
    (tmp_path / "mirror").mkdir()
    (said,) = answers(tmp_path, suite(), HF_HUB_OFFLINE="1")
    assert said.startswith(f"{OPEN} at {REVISION}: the hub cannot be reached (")
    assert said.endswith(f"fetch it with a network, or add --config MIRROR=<folder with {OPEN}>")
    (said,) = answers(tmp_path, suite(), HF_HUB_OFFLINE="1", MIRROR=str(tmp_path / "mirror"))
    assert f"not in MIRROR={tmp_path / 'mirror'}, and the hub cannot be reached" in said
    assert said.endswith(f"or put it into {tmp_path / 'mirror' / OPEN}")


@pytest.mark.parametrize("carded", [False, True])
def test_a_mirror_folder_is_taken_before_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, carded: bool
) -> None:
    folder = tmp_path / OPEN
    (folder / "main").mkdir(parents=True)
    if carded:
        card = "configs:\n- config_name: main\n  data_files:\n  - {split: train, path: main/train-*}\n"
        (folder / "README.md").write_text(f"---\n{card}---\n", encoding="utf-8")
    part = folder / "main" / "train-00000-of-00001.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"q": [f"{n} + 1?" for n in range(9)], "a": list(range(1, 10))}), part)
    monkeypatch.setenv("MIRROR", str(tmp_path))
    where = {"repo": OPEN, "config": "main", "split": "train", "revision": REVISION, "columns": COLUMNS}
    rows = RowsJob(label="t", source=HubRows(kind="hub", seed=0, validation_rows=2, **where))
    record = make_rows(rows, tmp_path / "rows")
    assert record.rows == {"train": 7, "validation": 2}
    assert {row["answer"] for row in read_rows(tmp_path / "rows" / "train.json")} < set("123456789")
    assert record.provenance.input_sha256 == {"file 1": sha256(part)}
    with pytest.raises(UserError, match=rf"{OPEN}: Unknown split \"test\".*; correct `split`"):
        make_suite(SuiteJob(label="t", source=suite()), tmp_path / "suite")
