"""Reading, splitting and writing rows."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from harness.errors import UserError
from harness.inputs.generated import split_of
from harness.inputs.make_rows import make_rows, make_suite
from harness.inputs.rows import Row, read_rows
from harness.records.atomic import sha256
from harness.records.run import RowsRecord
from harness.study.jobs import RowsJob, SuiteJob
from harness.study.paths import resolve
from harness.study.spec import FileRows, FileSuite, GeneratedRows, GeneratedSuite
from house import SHARED

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared with the real data files is not here")


def row(number: int, **changes: str) -> dict[str, str]:
    return {"instruction": f"question {number}", "input": "", "output": "is 1", "answer": "1"} | changes


def written(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_llm_adapters_rows_are_read_plain_and_gzipped(tmp_path: Path) -> None:
    rows = [row(1), row(2)]
    plain = written(tmp_path / "a.json", rows)
    packed = tmp_path / "a.json.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_rows(plain) == read_rows(packed) == rows


def test_gsm8k_loses_calculator_marks_and_ends_in_its_answer(tmp_path: Path) -> None:
    line = {"question": "How much?", "answer": "10*200 = $<<10*200=2000>>2,000 a day\u2028.\n#### 2,000"}
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rows(path) == [
        Row(
            instruction="How much?",
            input="",
            output="10*200 = $2,000 a day\u2028.\nThe answer is 2000.",
            answer="2000",
        )
    ]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([row(1), {"instruction": "x"}], "row 2: no field 'input'"),
        ([row(1), row(2, input="context")], "row 2: field 'input' is not empty"),
        ([{**row(1), "answer": 3}], "row 1: field 'answer' is int"),
        ({"data": []}, "expected a list of rows, found dict"),
    ],
)
def test_a_bad_row_is_named_with_file_and_row(tmp_path: Path, value: object, message: str) -> None:
    path = written(tmp_path / "bad.json", value)
    with pytest.raises(UserError, match=r"bad\.json.*") as caught:
        read_rows(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_a_broken_and_a_wrongly_packed_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.json: no such file"):
        read_rows(tmp_path / "gone.json")
    (tmp_path / "text.json").write_text("hello", encoding="utf-8")
    with pytest.raises(UserError, match=r"text\.json: not JSON"):
        read_rows(tmp_path / "text.json")
    (tmp_path / "plain.json.gz").write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match=r"plain\.json\.gz: cannot be read as gzipped"):
        read_rows(tmp_path / "plain.json.gz")


def test_gsm8k_without_a_final_number_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"question": "q", "answer": "just words"}) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"row 1: field 'answer' has no '#### N'"):
        read_rows(path)


def test_variables_in_paths_are_resolved_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRASS_DATA", "/data")
    monkeypatch.delenv("GRASS_NONE", raising=False)
    assert resolve("${GRASS_DATA}/a.json") == Path("/data/a.json")
    with pytest.raises(UserError, match="GRASS_NONE is not set: export GRASS_NONE="):
        resolve("${GRASS_NONE}/a.json")


def test_file_rows_are_split_by_seed_and_empty_outputs_counted(tmp_path: Path) -> None:
    first = written(tmp_path / "1.json", [row(n) for n in range(30)])
    second = written(tmp_path / "2.json", [row(n) for n in range(30, 40)] + [row(99, output=" ")])
    source = FileRows(kind="files", paths=(str(first), str(second)), seed=0, validation_rows=10)
    record = make_rows(RowsJob(label="math", source=source), tmp_path / "rows")
    train, validation = (read_rows(tmp_path / "rows" / f"{split}.json") for split in ("train", "validation"))
    assert sorted(r["instruction"] for r in train + validation) == sorted(f"question {n}" for n in range(40))
    assert (record.rows, record.dropped_rows) == ({"train": 30, "validation": 10}, 1)
    assert set(record.provenance.input_sha256.values()) == {sha256(first), sha256(second)}
    again = make_rows(RowsJob(label="math", source=source), tmp_path / "again")
    other = make_rows(RowsJob(label="math", source=source.model_copy(update={"seed": 1})), tmp_path / "other")
    assert again.files_sha256 == record.files_sha256 != other.files_sha256


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "few.json", [row(n) for n in range(5)])
    source = FileRows(kind="files", paths=(str(path),), seed=0, train_rows=4, validation_rows=2)
    with pytest.raises(UserError, match=r"few\.json: 5 rows with an output, but .* ask for 6"):
        make_rows(RowsJob(label="math", source=source), tmp_path / "rows")


def test_generated_rows_and_suites_carry_a_manifest_and_share_no_question(tmp_path: Path) -> None:
    source = GeneratedRows(kind="generated", family="arithmetic", seed=7, train_rows=200, validation_rows=50)
    record = make_rows(RowsJob(label="arithmetic", source=source), tmp_path / "rows")
    suite = GeneratedSuite(kind="generated", variant="two-step", seed=7, rows=50, scoring="number", max_new_tokens=24)
    tested = make_suite(SuiteJob(label="two-step", source=suite), tmp_path / "suite")
    files = {p: read_rows(p) for p in sorted(tmp_path.glob("*/*.json")) if p.name != "manifest.json"}
    assert {p.name: len(rows) for p, rows in files.items()} == {
        "train.json": 200,
        "validation.json": 50,
        "test.json": 50,
    }
    assert all(split_of(r["instruction"]) == p.stem for p, rows in files.items() for r in rows)
    manifest = (tmp_path / "rows" / "manifest.json").read_text(encoding="utf-8")
    assert RowsRecord.model_validate_json(manifest) == record
    assert tested.rows == {"test": 50}


def test_a_file_suite_keeps_the_first_rows_in_order(tmp_path: Path) -> None:
    path = written(tmp_path / "t.json", [row(n) for n in range(9)])
    source = FileSuite(kind="files", path=str(path), limit=3, scoring="number", max_new_tokens=8)
    make_suite(SuiteJob(label="t", source=source), tmp_path / "suite")
    assert read_rows(tmp_path / "suite" / "test.json") == [row(0), row(1), row(2)]


@needs_shared
@pytest.mark.parametrize(
    ("name", "count", "answers"),
    [
        ("llm-adapters/dataset/openbookqa/test.json", 500, {f"answer{k}" for k in range(1, 5)}),
        ("llm-adapters/dataset/boolq/test.json", 3270, {"true", "false"}),
        ("llm-adapters/dataset/ARC-Easy/test.json", 2376, {f"answer{k}" for k in range(1, 6)}),
        ("llm-adapters/dataset/piqa/train.json.gz", 16113, {"solution1", "solution2"}),
        ("gsm8k/train.jsonl", 7473, None),
    ],
)
def test_real_files_are_read_whole(name: str, count: int, answers: set[str] | None) -> None:
    rows = read_rows(SHARED / "data" / name)
    assert len(rows) == count
    if answers is None:
        assert all(r["output"].endswith(f"The answer is {r['answer']}.") and "<<" not in r["output"] for r in rows)
        assert all(float(r["answer"]) == int(float(r["answer"])) for r in rows)
    else:
        assert {r["answer"] for r in rows} == answers
        assert all(r["output"] == f"the correct answer is {r['answer']}" for r in rows)
