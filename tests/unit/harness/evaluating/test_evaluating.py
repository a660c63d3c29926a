"""Scoring end to end on a small Llama that has learned a list of answers by heart."""

import json
import random
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
from harness.errors import UserError
from harness.evaluating import score as scoring
from harness.evaluating.score import evaluate
from harness.inputs.prompts import Row, evaluation_prompt
from harness.records.atomic import write_record
from harness.records.columns import DOCUMENT_COLUMNS
from harness.records.held import hashes
from harness.records.inputs import RowsRecord
from harness.records.provenance import provenance
from harness.records.reading import read
from harness.records.run import EvalRecord, TrainRecord
from harness.stages import evaluate as stage
from harness.study.jobs import EvalJob, RunJob, SuiteJob
from learned_rows import ROWS, known_rows, learned, write_suite

HERE = SimpleNamespace(
    source_sha256="", git_commit=None, git_dirty=None, packages={}, python="", platform="", device="cpu", threads=1,
    started_utc="", input_sha256={},
)  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return known_rows()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learned(tmp_path_factory.mktemp("run") / "checkpoint")


def suite(label: str, *, limit: int | None = None, scoring: str = "answer", max_new_tokens: int = 8) -> SuiteJob:
    source = {"kind": "files", "path": "x", "limit": limit, "scoring": scoring, "max_new_tokens": max_new_tokens}
    return SuiteJob.model_validate({"label": label, "source": source})


def train_record(checkpoint: Path | None, **changes: Any) -> TrainRecord:
    fields: dict[str, Any] = {
        "name": "run-1", "status": "ok", "model": "m", "task": "t", "method": "full", "module": "full", "options": {},
        "seed": 0, "recipe": {"weight_dtype": "fp32", "device": "cpu"}, "recipe_changes": [], "lr": 1e-3,
        "lr_searched": False, "steps_done": 1, "checkpoint": None if checkpoint is None else str(checkpoint),
        "parameters": None, "provenance": vars(HERE),
    }  # fmt: skip
    return TrainRecord.model_validate(fields | changes)


@pytest.fixture
def scored(tmp_path: Path, checkpoint: Path) -> Callable[..., tuple[EvalRecord, pd.DataFrame]]:
    """Evaluate suites given as rows by label; returns what lies on the disk afterwards."""

    def run(
        tests: dict[str, list[Row]],
        *,
        trained: list[Row],
        batch_size: int = 64,
        state_folder: Path | None = None,
        **changes: Any,
    ) -> Any:
        jobs = tuple(suite(label, limit=changes.pop("limit", None)) for label in tests)
        out = tmp_path / "eval" / "e.json"
        returned = evaluate(
            EvalJob(task="t", suites=jobs, max_length=64),
            train_record=train_record(changes.pop("model_path", checkpoint), **changes),
            suite_folders={label: write_suite(tmp_path / label, test) for label, test in tests.items()},
            rows_folder=write_train(tmp_path / "rows", trained),
            out=out,
            batch_size=batch_size,
            state_folder=state_folder,
        )
        assert returned == read(out, EvalRecord)
        return returned, pd.read_parquet(out.with_suffix(".parquet"))

    return run


def write_train(folder: Path, rows: list[Row]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def test_record_and_table_agree_and_shuffled_labels_give_chance(scored: Any, rows: list[Row]) -> None:
    golds = [row["answer"] for row in rows]
    random.Random(11).shuffle(golds)
    shuffled = [Row(**{**row, "answer": gold}) for row, gold in zip(rows, golds, strict=True)]
    untouched = [Row(**{**row, "instruction": f"Is it so? {row['instruction']}"}) for row in rows[:5]]
    other = [Row(**{**row, "instruction": row["instruction"].upper().replace("?", " ?")}) for row in rows[:7]]
    record, table = scored({"true": rows, "shuffled": shuffled, "untouched": untouched}, trained=other)

    assert record.status == "ok"
    assert list(table.columns) == list(DOCUMENT_COLUMNS)
    right, chance, _ = record.scores
    assert right.correct >= 0.95 * ROWS
    assert right.unparsed == 0
    # One in four, three standard errors either way.
    assert abs(chance.correct / ROWS - chance.chance) < 3 * (0.25 * 0.75 / ROWS) ** 0.5
    assert chance.chance == 0.25
    assert [score.leaked_rows for score in record.scores] == [7, 7, 0]
    for score in record.scores:
        part = table[table["suite"] == score.suite]
        assert list(part["document"]) == list(range(score.rows))
        assert int(part["correct"].sum()) == score.correct
        assert int((~part["parsed"]).sum()) == score.unparsed
        assert int(part["tokens"].sum()) == score.heldout_tokens
        assert (part["loss"] * part["tokens"]).sum() / part["tokens"].sum() == pytest.approx(score.heldout_loss)
        assert ((part["prediction"] == part["gold"]) == part["correct"]).all()
    true = table[table["suite"] == "true"]
    assert list(true["gold"]) == [row["answer"] for row in rows]
    # Labels were shuffled, reference outputs were not: the same held-out loss.
    assert chance.heldout_loss == pytest.approx(right.heldout_loss, rel=1e-6)
    assert right.heldout_loss < 0.1
    decoding = record.decoding
    assert (decoding["do_sample"], decoding["num_beams"], decoding["batch_size"]) == (False, 1, 64)
    assert decoding["eos_token_id"] == 2
    assert decoding["suites"]["true"]["max_new_tokens"] == 8
    assert {"suite:true", "suite:shuffled", "rows:train", "checkpoint:model.safetensors"} <= set(
        record.provenance.input_sha256
    )


def test_long_scoring_shows_how_far_it_is(
    scored: Any, rows: list[Row], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("harness.progress.LINE_EVERY_S", -1.0)
    record, _ = scored({"true": rows[:10]}, trained=[])
    said = capsys.readouterr().err
    assert [f"evaluate {record.run} true: {done}/10 answers, " in said for done in range(1, 11)] == [True] * 10


def test_worked_examples_and_forgetting_and_likelihood_are_told_apart(
    tmp_path: Path, checkpoint: Path, rows: list[Row]
) -> None:
    """The model knows its rows by heart, so the labels' likelihood finds them; the options' texts it never learned."""
    options = [
        Row(**{**row, "instruction": row["instruction"].replace("\n\nAnswer f", "\n\nAnswer1: 0 Answer2: 1 Answer3: 2 "
                                                                "Answer4: 3\n\nAnswer f")})
        for row in rows[:12]
    ]  # fmt: skip
    likely = {"kind": "files", "path": "x", "scoring": "likelihood"}
    suites = (
        suite("written"),
        SuiteJob.model_validate({"label": "labels", "source": likely | {"choices": "labels"}}),
    )
    kept = (
        suite("before"),
        SuiteJob.model_validate({"label": "texts", "source": likely | {"choices": "texts"}}),
    )
    tests = {"written": rows[:12], "labels": rows[:12], "before": rows[:12], "texts": options}
    found = {}
    for shots in (0, 1):
        found[shots] = evaluate(
            EvalJob(task="t", suites=suites, forgetting=kept, shots=shots, max_length=64),
            train_record=train_record(checkpoint),
            suite_folders={label: write_suite(tmp_path / label, test) for label, test in tests.items()},
            rows_folder=write_train(tmp_path / "rows", rows[20:22]),
            out=tmp_path / f"{shots}.json",
            batch_size=8,
        )
    scores = {shots: {score.suite: score for score in record.scores} for shots, record in found.items()}
    plain, shot = scores[0], scores[1]
    assert plain["labels"].correct >= 11
    assert plain["labels"].correct_normalised == plain["labels"].correct
    assert plain["labels"].unparsed == plain["texts"].unparsed == 0
    assert plain["labels"].chance == plain["texts"].chance == 0.25
    assert plain["labels"].heldout_loss == plain["written"].heldout_loss
    assert (plain["texts"].heldout_loss, plain["texts"].heldout_tokens) == (None, 0)
    assert "asks otherwise" in str(plain["texts"].heldout_loss_why)
    assert [score.correct_normalised for score in (plain["written"], plain["before"])] == [None, None]
    # worked examples: in the task's own suites, in their name, never in the loss, never in forgetting
    assert [shot[label].protocol != plain[label].protocol for label in tests] == [True, True, False, False]
    assert shot["written"].protocol == "llm-adapters (greedy, 1-shot)"
    assert shot["before"] == plain["before"]
    assert shot["texts"] == plain["texts"]
    assert shot["written"].heldout_loss == plain["written"].heldout_loss
    settings = found[1].decoding["suites"]
    assert settings["written"]["first_question"].count("How many apples") == 2
    assert settings["before"]["first_question"] == evaluation_prompt(rows[0]["instruction"])
    assert settings["texts"]["first_answers"] == ["0", "1", "2", "3"]
    assert settings["texts"]["first_question"] == f"Question: {rows[0]['instruction'].split(chr(10))[0]}\nAnswer:"
    assert (found[1].decoding["prompt"], found[1].decoding["shots"]) == ("llm-adapters", 1)
    assert found[1].decoding["stop_strings"] == ["Below is an instruction that describes a task"]
    table = pd.read_parquet(tmp_path / "0.parquet")
    chosen = table[table["suite"] == "labels"]
    assert int(chosen["correct"].sum()) == plain["labels"].correct
    assert set(chosen["prediction"]) <= {"answer1", "answer2", "answer3", "answer4"}
    assert table[table["suite"] == "written"]["correct_normalised"].isna().all()


def test_a_run_that_ran_out_of_memory_is_skipped_with_its_reason(tmp_path: Path) -> None:
    out = tmp_path / "e.json"
    record = evaluate(
        EvalJob(task="t", suites=(suite("s"),), max_length=64),
        train_record=train_record(None, status="oom", status_why="needed 90 GB"),
        suite_folders={"s": tmp_path / "absent"}, rows_folder=tmp_path / "absent", out=out, batch_size=8,
    )  # fmt: skip
    assert (record.status, record.scores) == ("skipped", [])
    assert "oom (needed 90 GB)" in str(record.status_why)
    assert read(out, EvalRecord) == record
    table = pd.read_parquet(out.with_suffix(".parquet"))
    assert len(table) == 0
    assert list(table.columns) == list(DOCUMENT_COLUMNS)


def test_a_killed_scoring_goes_on_with_the_suite_it_was_in(
    scored: Any, rows: list[Row], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = {"first": rows[:6], "second": rows[6:14]}
    straight, table = scored(tests, trained=rows[:3])
    asked: list[int] = []
    usual = scoring.score_suite

    def counted(*given: Any, rows: list[Row], **named: Any) -> Any:
        asked.append(len(rows))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return usual(*given, rows=rows, **named)

    monkeypatch.setattr(scoring, "score_suite", counted)
    state = tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        scored(tests, trained=rows[:3], state_folder=state)
    again, same = scored(tests, trained=rows[:3], state_folder=state)
    assert asked == [6, 8, 8]
    assert (again.scores, again.decoding) == (straight.scores, straight.decoding)
    pd.testing.assert_frame_equal(same, table)
    # what was kept of another model, or of other rows, is not taken up
    changed, _ = scored(tests | {"second": rows[7:15]}, trained=rows[:3], state_folder=state)
    assert asked[3:] == [6, 8]
    assert changed.scores[1].rows == 8


def test_scoring_that_runs_out_of_memory_goes_on_with_smaller_batches(
    scored: Any, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = scoring.heldout_loss
    tried: list[int] = []

    def runs_out(*arguments: Any, batch_size: int, fits: int = 3, **named: Any) -> Any:
        tried.append(batch_size)
        if batch_size > fits:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
        return usual(*arguments, batch_size=batch_size, **named)

    monkeypatch.setattr(scoring, "heldout_loss", runs_out)
    tests = {"one": rows[:4], "two": rows[4:8]}
    record, table = scored(tests, trained=[], batch_size=8)
    assert record.status == "ok"
    assert tried == [8, 4, 2, 2]
    assert [record.decoding["suites"][label]["batch_size"] for label in tests] == [2, 2]
    assert table.groupby("suite").size().to_dict() == {"one": 4, "two": 4}  # nothing twice

    # not even one row fits: a row of the tables, with what was scored before
    monkeypatch.setattr(scoring, "heldout_loss", lambda *a, **k: runs_out(*a, **k, fits=8 if len(tried) < 5 else 0))
    record, table = scored({"one": rows[:4], "two": rows[4:8], "three": rows[8:12]}, trained=[], batch_size=8)
    assert record.status == "oom"
    assert record.status_why is not None
    assert record.status_why.startswith("in phase two: DefaultCPUAllocator: can't allocate memory")
    assert record.status_why.endswith("(with batches of one row)")
    assert [one.suite for one in record.scores] == ["one"]
    assert set(table["suite"]) == {"one"}


def test_a_disengaged_run_with_a_checkpoint_is_scored(scored: Any, rows: list[Row]) -> None:
    record, _ = scored({"s": rows[:6]}, trained=[], status="disengaged", status_why="layer 3 never moved", limit=6)
    assert record.status == "ok"
    assert record.scores[0].limited
    assert record.scores[0].correct >= 5


def test_a_checkpoint_that_is_gone_is_named(scored: Any, rows: list[Row]) -> None:
    with pytest.raises(UserError, match="nowhere: no such checkpoint"):
        scored({"s": rows[:2]}, trained=[], model_path=Path("nowhere"))


def test_bad_test_rows_are_named(scored: Any, rows: list[Row]) -> None:
    with pytest.raises(UserError, match=r"test\.json, row 2: answer 'C'"):
        scored({"s": [rows[0], Row(**{**rows[1], "answer": "C"})]}, trained=[])


def test_stage_finds_everything_by_the_layout(tmp_path: Path, checkpoint: Path, rows: list[Row]) -> None:
    results = tmp_path / "results"
    job = EvalJob(task="t", suites=(suite("s"),), forgetting=(suite("kept"),), max_length=64)
    run = RunJob.model_validate(
        {
            "training": {
                "model": {"label": "m", "source": {"kind": "local", "path": "x"}},
                "rows": {
                    "label": "t",
                    "source": {
                        "kind": "generated", "family": "choice", "seed": 0, "train_rows": 1, "validation_rows": 1,
                    },
                },
                "label": "full", "module": "full", "options": {}, "recipe_changes": (),
                "recipe": {
                    "steps": 1, "batch_size": 1, "micro_batch_size": 1, "max_length": 64, "loss_on": "answer",
                    "warmup_steps": 0, "max_grad_norm": 1.0,
                },
            },
            "lr": 1e-3, "search": None, "seed": 0, "observation": {"every_steps": 1, "rows": 1},
        }
    )  # fmt: skip
    folder = results / "runs" / run.name
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps(run.body()), encoding="utf-8")
    (folder / "train.json").write_text(train_record(checkpoint).model_dump_json(), encoding="utf-8")
    spec = results / "evals" / f"{job.name}.json"
    spec.parent.mkdir()
    spec.write_text(json.dumps(job.body()), encoding="utf-8")
    for each in job.all_suites:
        write_suite(results / "inputs" / "suites" / each.name, rows[:8])
    write_train(results / "inputs" / "rows" / run.training.rows.name, rows[:3])
    written = {("suites", each.name): "test.json" for each in job.all_suites}
    for (kind, name), file in (written | {("rows", run.training.rows.name): "train.json"}).items():
        place = results / "inputs" / kind / name
        made = RowsRecord(
            name=name, files_sha256=hashes(place, [place / file]), rows={}, provenance=provenance(roots=(), inputs={})
        )
        write_record(place / "manifest.json", made)
    out = folder / "eval" / f"{job.name}.json"
    threads = torch.get_num_threads()
    assert stage.run(Namespace(spec=spec, run=folder, out=out, threads=threads, batch_size=8)) == 0
    record = read(out, EvalRecord)
    assert (record.name, record.run, record.scores[0].rows, record.scores[0].leaked_rows) == (job.name, "run-1", 8, 3)
    assert [score.suite for score in record.scores] == ["s", "kept"]
    test = results / "inputs" / "suites" / job.suites[0].name / "test.json"
    test.write_text(test.read_text(encoding="utf-8").replace("1", "2", 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"test\.json: not the file that manifest\.json was written with; put it back"):
        stage.run(Namespace(spec=spec, run=folder, out=out, threads=threads, batch_size=8))
