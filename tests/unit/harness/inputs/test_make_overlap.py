"""Test items that occur in training rows are found by each rule, and by that rule alone; real files as counted once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness.inputs.make_overlap import NGRAM, make_overlap, overlap
from harness.inputs.make_rows import make_rows, make_suite
from harness.inputs.rows import read_rows
from harness.records.inputs import OverlapRecord
from harness.records.reading import read
from harness.study.jobs import OverlapJob, RowsJob, SuiteJob
from harness.study.paths import Paths
from harness.study.sources import FileRows, FileSuite
from house import SHARED

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared with the real data files is not here")
LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"
assert len(LONG.split()) == NGRAM


def written(path: Path, questions: list[str], output: str = "so it is") -> Path:
    rows = [{"instruction": q, "input": "", "output": output, "answer": "1"} for q in questions]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("trained", "output", "asked", "found"),
    [
        ("Ann has 3 apples.", "3", "ann has 3 apples", {"exact", "masked"}),
        ("Ann has 3 apples.", "3", "Ann has 12 apples.", {"masked"}),
        ("Ann has 3 apples.", "3", "Ben has 3 apples.", set()),
        (f"Now {LONG}, and so on.", "3", f"{LONG}?", {"ngram"}),
        ("How so?", f"Well: {LONG}.", f"{LONG}?", {"ngram"}),
        (f"Now {LONG}.", "3", LONG.rsplit(" ", 1)[0], set()),
        (f"Now {LONG}.", "3", LONG.replace("seven", "7"), set()),
    ],
)
def test_what_counts_as_the_same(trained: str, output: str, asked: str, found: set[str], tmp_path: Path) -> None:
    training = read_rows(written(tmp_path / "a.json", [trained, "Something else."], output))
    items = read_rows(written(tmp_path / "b.json", ["Unheard of.", asked]))
    shared = overlap(training, items)
    assert {kind for kind in ("exact", "masked", "ngram") if getattr(shared, kind) == (1,)} == found
    assert {kind for kind in ("exact", "masked", "ngram") if getattr(shared, kind) == ()} | found == {
        "exact", "masked", "ngram",
    }  # fmt: skip


def compared(train: Path, tests: dict[str, Path], folder: Path) -> OverlapRecord:
    paths = Paths(folder / "results")
    rows = RowsJob(label="task", source=FileRows(kind="files", paths=(str(train),), seed=0, validation_rows=1))
    suites = tuple(
        SuiteJob(label=label, source=FileSuite(kind="files", path=str(path), scoring="number", max_new_tokens=8))
        for label, path in tests.items()
    )
    make_rows(rows, paths.rows(rows.name))
    for suite in suites:
        make_suite(suite, paths.suite(suite.name))
    job = OverlapJob(rows=rows, suites=suites)
    made = make_overlap(job, paths, paths.overlap(job.name))
    assert read(paths.overlap(job.name), OverlapRecord) == made
    return made


def test_validation_rows_do_not_count(tmp_path: Path) -> None:
    """They are not trained on; of three rows one is held out."""
    questions = ["Ann has 3 apples.", "Ben has 4 pears.", "Cleo has 5 plums."]
    train = written(tmp_path / "train.json", questions)
    record = compared(train, {"all": written(tmp_path / "test.json", questions)}, tmp_path)
    assert record.train_rows == 2
    assert len(record.suites[0].exact) == len(record.suites[0].masked) == 2


@needs_shared
def test_the_mawps_training_file_holds_the_tests_that_its_readme_warns_of(tmp_path: Path) -> None:
    """Counted in the fact sheet on the whole file; here one validation row is left out."""
    folder = SHARED / "data" / "llm-adapters" / "dataset"
    rows = json.loads((folder / "mawps" / "trainset.json").read_text(encoding="utf-8"))
    train = written(tmp_path / "train.json", [row["original_text"] for row in rows])
    names = ("MultiArith", "AddSub", "SingleEq", "SVAMP", "gsm8k")
    record = compared(train, {name.lower(): folder / name / "test.json" for name in names}, tmp_path)
    exact = {suite.suite: len(suite.exact) for suite in record.suites}
    assert exact["svamp"] == exact["gsm8k"] == 0
    for name, counted in {"multiarith": 452, "addsub": 327, "singleeq": 416}.items():
        assert counted - 5 <= exact[name] <= counted + 5
