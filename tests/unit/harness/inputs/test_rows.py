"""Reading, splitting and writing rows."""

from __future__ import annotations

import csv
import gzip
import json
from functools import partial
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from harness.errors import UserError
from harness.inputs.generated import split_of
from harness.inputs.make_rows import make_rows, make_suite
from harness.inputs.rows import Row, read_rows
from harness.records.atomic import sha256
from harness.records.inputs import RowsRecord
from harness.records.reading import read
from harness.study.jobs import RowsJob, SuiteJob
from harness.study.paths import resolve
from harness.study.sources import Columns, FileRows, FileSuite, GeneratedRows, GeneratedSuite
from harness.tasks.protocol import check_row
from house import SHARED

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared with the real data files is not here")


def row(number: int, **changes: str) -> dict[str, str]:
    return {"instruction": f"question {number}", "input": "", "output": "is 1", "answer": "1"} | changes


def turns(*given: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in given]


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
        ([row(1), {"text": "x", "answer": "y"}], "row 2: no field 'instruction', there are 'text', 'answer'; say with"),
        ([row(1), {"instruction": "x"}], "row 2: no field 'output', there are 'instruction'; say with `columns`"),
        ([row(1), row(2, instruction=" ")], "row 2: the instruction is empty"),
        ([{**row(1), "answer": [3]}], "row 1: field 'answer' is list, expected text: put it in quotes"),
        ([{**row(1), "answer": float("nan")}], "row 1: field 'answer' is nan, expected text"),
        ([row(1), row(2, output="a\ud83d")], "row 2: field 'output': character 2 is half a surrogate pair (\\ud83d)"),
        ([row(1), "text"], "row 2: a row is a set of named fields, found str"),
        ({"data": []}, "expected a list of rows, found dict"),
        ([{"messages": "hi"}], "row 1: field 'messages' is str, expected a list of role and content"),
        ([{"messages": [{"role": "user"}]}], "row 1: field 'messages', message 1: no role and content"),
        ([{"messages": turns(("tool", "x"))}], "message 1: role 'tool' is none of system, user, assistant"),
        ([{"messages": turns(("user", "x"))}], "must hold a user's turn and end with the assistant's"),
        ([{"messages": turns(("user", ""), ("assistant", "x"))}], "field 'messages', message 1 is empty"),
        (
            [{"messages": [{"role": "assistant", "content": "x", "tool_calls": [1]}]}],
            "'tool_calls' cannot be trained on",
        ),
        ([{"messages": turns(("user", "a\udc00"), ("assistant", "x"))}], "field 'messages, message 1': character 2"),
        ([row(1) | {"history": ["x"]}], "row 1: field 'history' is no list of pairs"),
    ],
)
def test_a_bad_row_is_named_with_file_and_row(tmp_path: Path, value: object, message: str) -> None:
    path = written(tmp_path / "bad.json", value)
    with pytest.raises(UserError, match=r"bad\.json.*") as caught:
        read_rows(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_alpaca_rows_need_no_answer_and_may_have_an_input(tmp_path: Path) -> None:
    path = written(tmp_path / "alpaca.json", [{"instruction": "Add.", "input": "1, 2", "output": "3"}])
    assert read_rows(path) == [Row(instruction="Add.", input="1, 2", output="3", answer="3")]
    assert read_rows(written(tmp_path / "q.json", [{"instruction": "Add.", "answer": 3.0}])) == [
        Row(instruction="Add.", input="", output="3", answer="3")
    ]


def test_conversations_are_read_and_come_back_the_same_from_our_own_files(tmp_path: Path) -> None:
    talk = turns(
        ("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "2"), ("user", "And 3?"), ("assistant", "5")
    )
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [turn | {"weight": None} for turn in talk]}) + "\n", encoding="utf-8")
    (found,) = read_rows(path)
    assert (found["instruction"], found["output"], found["answer"]) == ("1 + 1?\nAnd 3?", "5", "5")
    assert found["messages"] == talk
    assert read_rows(written(tmp_path / "train.json", [found])) == [found]


def test_earlier_turns_of_an_alpaca_row_make_it_a_conversation(tmp_path: Path) -> None:
    rows = [row(1, input="now"), row(2) | {"history": []}, row(3, input="now") | {"history": [["before", "yes"]]}]
    found = read_rows(written(tmp_path / "lima.json", rows))
    assert ["messages" in each for each in found] == [False, False, True]
    assert found[2]["messages"] == turns(
        ("user", "before"), ("assistant", "yes"), ("user", "question 3\nnow"), ("assistant", "is 1")
    )


NAMED = Columns(instruction="The question", output="{sum}\nThe answer is {right}.", answer="right")
VALUES = [
    {"The question": "1 + 1?", "sum": "1+1=2", "right": 2.0},
    {"The question": "a, b\n?", "sum": "x", "right": 2.5},
]
MADE = [
    Row(instruction="1 + 1?", input="", output="1+1=2\nThe answer is 2.", answer="2"),
    Row(instruction="a, b\n?", input="", output="x\nThe answer is 2.5.", answer="2.5"),
]


def as_file(path: Path, values: list[dict[str, Any]]) -> bytes:
    """The bytes of a file of that kind."""
    if path.suffix == ".parquet":
        buffer = BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), buffer)
        return buffer.getvalue()
    if path.suffix == ".csv":
        text = StringIO()
        writer = csv.DictWriter(text, values[0].keys())
        writer.writeheader()
        writer.writerows([{key: "2" if value == 2.0 else value for key, value in each.items()} for each in values])
        return text.getvalue().encode()
    if path.suffix == ".jsonl":
        return "\n".join(map(json.dumps, values)).encode()
    return json.dumps(values).encode()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str, marked: bool, packed: bool) -> None:
    path = tmp_path / f"mine.{kind}"
    data = (b"\xef\xbb\xbf" if marked and kind != "parquet" else b"") + as_file(path, VALUES)
    if packed:
        path, data = path.with_name(f"{path.name}.gz"), gzip.compress(data)
    path.write_bytes(data)
    assert read_rows(path, NAMED) == MADE


def test_a_cell_of_a_csv_stays_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("instruction,answer\nwhich agent?,007\n\nhow much?,1.50\n", encoding="utf-8")
    assert [each["answer"] for each in read_rows(path)] == ["007", "1.50"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b,a\n1,2,3\n", "two columns are called 'a'; rename one"),
        ("a,b\n1,2\n1,2,3\n", r"row 2: 3 cells, but the header has 2 \('a', 'b'\)"),
        ('a,b\n1,2\n1,"2\n', r"row 2: not CSV \(unexpected end of data\)"),
        ("question,reply\n1,2\n", "row 1: no column 'The question', there are 'question', 'reply'; correct `columns`"),
    ],
)
def test_a_bad_csv_is_named_with_its_row(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"bad\.csv.*{said}") as caught:
        read_rows(path, NAMED)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_what_its_name_says_is_refused(tmp_path: Path) -> None:
    for name, data, said in (
        ("rows.txt", b"[]", r"rows are read from \.json, \.jsonl, \.csv, \.parquet"),
        ("rows.json", b'{"a": 1}\n{"a": 2}\n', r"not JSON \(Extra data.*a file with one row a line is named \.jsonl"),
        ("rows.jsonl", b'{"a": 1}\n{"a"\n', r"rows\.jsonl, row 2: not JSON"),
        ("rows.parquet", b"PAR1", "cannot be read as Parquet"),
        ("rows.csv", "a\n\u00e9".encode("latin-1"), "cannot be read as UTF-8 text"),
        ("rows.csv.gz", gzip.compress(b"a,b\n1,2\n")[:-9], "cannot be read as gzipped"),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(UserError, match=said) as caught:
            read_rows(path)
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


def test_rows_that_occur_in_other_files_are_left_out_and_counted(tmp_path: Path) -> None:
    own = ["Ann has 3 apples .", "Ann's  3.5 pears?", "Bob has 1,000 coins.", "Ann lost 3 apples."]
    path = written(
        tmp_path / "own.json", [{"text": text, "out": "x"} for text in [*own, *map("more {}".format, "abcd")]]
    )
    test = written(tmp_path / "test.json", [row(1, instruction="ann has 12 Apples."), row(2, instruction="lost")])
    raw = written(tmp_path / "raw.json", [{"text": "Ann 's 20 pears ?"}])
    source = FileRows(
        kind="files", paths=(str(path),), seed=0, validation_rows=1, without=(str(test), str(raw)),
        columns=Columns(instruction="text", output="out"),
    )  # fmt: skip
    record = make_rows(RowsJob(label="mine", source=source), tmp_path / "rows")
    kept = {
        r["instruction"] for split in ("train", "validation") for r in read_rows(tmp_path / "rows" / f"{split}.json")
    }
    assert kept == {*own[2:], *map("more {}".format, "abcd")}
    assert (record.overlapping_rows, record.dropped_rows) == (2, 0)
    assert set(record.provenance.input_sha256) == {"file 1", "without 1", "without 2"}
    few = source.model_copy(update={"validation_rows": 7})
    with pytest.raises(UserError, match=r"6 rows with an output \(2 more occur in `without`\), but .* at least 8"):
        make_rows(RowsJob(label="mine", source=few), tmp_path / "few")


@needs_shared
def test_mawps_without_every_test_set_keeps_what_no_test_has(tmp_path: Path) -> None:
    folder = SHARED / "data" / "llm-adapters" / "dataset"
    names = ("MultiArith", "AddSub", "SingleEq", "SVAMP", "gsm8k", "AQuA", "mawps")
    tests = tuple(str(folder / name / "test.json") for name in names)
    mawps = FileRows(
        kind="files", paths=tuple(str(folder / "mawps" / f"{name}set.json") for name in ("train", "valid")), seed=0,
        validation_rows=1, without=tests,
        columns=Columns(instruction="original_text", output="{equation}\nThe answer is {ans}.", answer="ans"),
    )  # fmt: skip
    record = make_rows(RowsJob(label="mawps", source=mawps), tmp_path / "mawps")
    # the data sheet counts 1,364, with spaces kept: 35 more differ from a test item by "did n't" against "didn't" alone
    assert (sum(record.rows.values()), record.overlapping_rows) == (736, 1364 + 35)
    first = read_rows(tmp_path / "mawps" / "train.json")[0]
    assert first["output"].endswith(f"The answer is {first['answer']}.")
    gsm8k = FileRows(
        kind="files", paths=(str(SHARED / "data" / "gsm8k" / "train.jsonl"),), seed=0, validation_rows=1, without=tests
    )
    record = make_rows(RowsJob(label="gsm8k", source=gsm8k), tmp_path / "gsm8k")
    assert (sum(record.rows.values()), record.overlapping_rows) == (7473, 0)


def test_an_answer_that_no_prediction_can_equal_stops_the_suite_with_its_row(tmp_path: Path) -> None:
    path = written(tmp_path / "t.json", [row(1), row(2, answer="1,000"), row(3, answer="x")])
    source = FileSuite(kind="files", path=str(path), limit=2, scoring="number", max_new_tokens=8)
    job = SuiteJob(label="t", source=source)
    with pytest.raises(UserError, match=r"t\.json, row 2: answer '1,000' is not a number.*: write '1000'; correct"):
        make_suite(job, tmp_path / "suite", check=partial(check_row, job.source))
    assert not (tmp_path / "suite" / "manifest.json").exists()


def test_a_suite_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("instruction,answer\n", encoding="utf-8")
    source = FileSuite(kind="files", path=str(tmp_path / "t.csv"), scoring="number", max_new_tokens=8)
    with pytest.raises(UserError, match=r"t: .*t\.csv.* no rows"):
        make_suite(SuiteJob(label="t", source=source), tmp_path / "suite")


def test_keys_that_came_later_leave_older_names_alone() -> None:
    rows = FileRows(kind="files", paths=("a.json",), seed=0, validation_rows=1)
    suite = FileSuite(kind="files", path="a.json", scoring="number", max_new_tokens=1)
    assert set(rows.model_dump()) == {"kind", "paths", "seed", "train_rows", "validation_rows"}
    assert set(suite.model_dump()) == {"kind", "path", "limit", "scoring", "max_new_tokens"}


def test_files_with_different_columns_make_one_task(tmp_path: Path) -> None:
    ours = written(tmp_path / "a.json", [row(n) for n in range(4)])
    theirs = written(tmp_path / "b.json", [{"text": f"other {n}", "x": "1+1", "ans": 2.0} for n in range(4)])
    columns = {"instruction": "text", "output": "{x}. The answer is {ans}.", "answer": "ans"}
    source = FileRows.model_validate(
        {"kind": "files", "paths": [str(ours), {"path": str(theirs), "columns": columns}], "seed": 0}
        | {"validation_rows": 1},
        strict=False,
    )
    made = make_rows(RowsJob(label="t", source=source), tmp_path / "out")
    assert made.rows == {"train": 7, "validation": 1}
    both = [*read_rows(tmp_path / "out/train.json"), *read_rows(tmp_path / "out/validation.json")]
    assert sorted(each["output"] for each in both) == ["1+1. The answer is 2."] * 4 + ["is 1"] * 4


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
    assert read(tmp_path / "rows" / "manifest.json", RowsRecord) == record
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
