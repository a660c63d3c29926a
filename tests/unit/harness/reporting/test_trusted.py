"""A record that does not agree with its job, its log or its documents is named, and never averaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from harness.checking.contract import Case
from harness.checking.tiny import tiny_inputs
from harness.errors import UserError
from harness.records import atomic
from harness.records.held import hashes
from harness.records.inputs import OverlapRecord, RowsRecord
from harness.records.provenance import provenance
from harness.records.reading import read
from harness.records.run import EvalRecord, LmEvalScore, SearchRecord, SuiteScore, TrainRecord, Trial
from harness.reporting.collecting import collect
from harness.study.jobs import ROWS, SEARCH, TRAIN
from harness.study.paths import Paths
from harness.study.plan import Plan, resolve_study
from study_files import load

DOCUMENTS = 8
NONE = provenance(roots=(), inputs={})


@dataclass(frozen=True)
class Results:
    """Of a whole study, each record with its seal."""

    plan: Plan
    paths: Paths

    def train(self) -> Path:
        """A record of the method whose rate is in the config."""
        name = next(name for name, run in self.plan.runs.items() if run.training.label == "fixed")
        return self.paths.output(TRAIN, name)

    def score(self) -> Path:
        name = self.train().parent.name
        return self.paths.score(name, self.plan.evaluation_of[name])

    def search(self) -> Path:
        return self.paths.output(SEARCH, next(iter(self.plan.searches)))

    def change(self, path: Path, kind: Any, **changed: Any) -> None:
        atomic.write_record(path, read(path, kind).model_copy(update=changed))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainRecord, str]:
    folder = tmp_path_factory.mktemp("case")
    record = Case("full", {}, tiny_inputs(folder / "inputs"), folder).standard()
    return record, (folder / "standard" / "steps.jsonl").read_text(encoding="utf-8")


@pytest.fixture
def results(tmp_path: Path, trained: tuple[TrainRecord, str]) -> Results:
    plan, paths = resolve_study(load(tmp_path)), Paths(tmp_path / "results")
    for name in plan.rows:
        atomic.write_record(paths.output(ROWS, name), RowsRecord(name=name, files_sha256={}, rows={}, provenance=NONE))
    for name, job in plan.searches.items():
        labels: dict[str, Any] = {"model": "tiny", "task": "sums", "method": job.training.label}
        trials = [
            Trial(lr=lr, seed=seed, status="ok", validation_loss=1.0 + lr, extension=False)
            for lr in job.search.grid
            for seed in job.search.seeds
        ]
        found = SearchRecord(name=name, lr=1e-3, at_edge=False, trials=trials, wall_s=1.0, provenance=NONE, **labels)
        atomic.write_record(paths.output(SEARCH, name), found)
    for name in plan.overlaps:
        nothing = OverlapRecord(name=name, task="sums", train_rows=9, suites=[], provenance=NONE)
        atomic.write_record(paths.overlap(name), nothing)
    for name in plan.runs:
        write_run(plan, paths, name, *trained)
    return Results(plan, paths)


def write_run(plan: Plan, paths: Paths, name: str, record: TrainRecord, steps: str) -> None:
    run, folder = plan.runs[name], paths.run(name)
    atomic.write_text(folder / "steps.jsonl", steps)
    labels = {"name": name, "model": "tiny", "task": "sums", "method": run.training.label, "seed": run.seed}
    known = {"module": run.training.module, "lr": run.lr or 1e-3, "steps_done": run.training.recipe.steps}
    files = {"files_sha256": hashes(folder, folder.glob("*.jsonl")), "provenance": NONE}
    atomic.write_record(paths.output(TRAIN, name), record.model_copy(update=labels | known | files))
    path = paths.score(name, plan.evaluation_of[name])
    table = pd.DataFrame(
        [
            {"run": name, "suite": "two-step", "document": n, "correct": n < 2, "correct_normalised": None,
             "parsed": n < 7, "prediction": "1", "gold": "1", "loss": 1.0 + n, "tokens": 2 + n % 2}
            for n in range(DOCUMENTS)
        ]
    )  # fmt: skip
    path.parent.mkdir(parents=True)
    table.to_parquet(path.with_suffix(".parquet"))
    loss = float((table["loss"] * table["tokens"]).sum() / table["tokens"].sum())
    score = SuiteScore(
        suite="two-step", scoring="number", protocol="llm-adapters", rows=DOCUMENTS, limited=False, correct=2,
        unparsed=1, chance=None, heldout_loss=loss, heldout_tokens=20, truncated_rows=0, leaked_rows=0,
    )  # fmt: skip
    made = EvalRecord(
        name=path.stem, run=name, status="ok", decoding={}, scores=[score], wall_s=1.0, provenance=NONE,
        files_sha256=hashes(path.parent, [path.with_suffix(".parquet")]),
    )  # fmt: skip
    atomic.write_record(path, made)


def test_what_agrees_is_collected(results: Results) -> None:
    frames = collect(results.plan, results.paths)
    assert set(frames.runs["status"]) == {"ok"}
    assert set(frames.scores["accuracy"]) == {2 / DOCUMENTS}


def scored(results: Results, **changed: Any) -> None:
    (score,) = read(results.score(), EvalRecord).scores
    results.change(results.score(), EvalRecord, scores=[score.model_copy(update=changed)])


def twice(results: Results) -> None:
    (score,) = read(results.score(), EvalRecord).scores
    results.change(results.score(), EvalRecord, scores=[score, score])


def lines(results: Results) -> None:
    steps = results.train().parent / "steps.jsonl"
    steps.write_text("".join(steps.read_text(encoding="utf-8").splitlines(True)[:-1]), encoding="utf-8")


def other_documents(results: Results) -> None:
    path = results.score().with_suffix(".parquet")
    table = pd.read_parquet(path)
    table["correct"] = True
    table.to_parquet(path)


DEFECTS: dict[str, tuple[Callable[[Results], None], str]] = {
    "name": (lambda r: r.change(r.train(), TrainRecord, name="grass"), "name is 'grass', where"),
    "method": (lambda r: r.change(r.train(), TrainRecord, method="grass"), "method is 'grass', where 'fixed' was"),
    "seed": (lambda r: r.change(r.train(), TrainRecord, seed=7), "seed is 7, where 0 was asked for"),
    "rate": (lambda r: r.change(r.train(), TrainRecord, lr=0.5), "lr is 0.5, where 0.001 was asked for"),
    "steps": (lambda r: r.change(r.train(), TrainRecord, steps_done=3), "an ok run of 3 steps, where 12 were"),
    "log": (lines, "steps.jsonl: not the file that train.json was written with"),
    "suite": (lambda r: scored(r, suite="other"), "suite two-step is scored 0 times, where two-step were asked"),
    "suite twice": (twice, "suite two-step is scored 2 times"),
    "correct": (lambda r: scored(r, correct=999), "suite two-step has correct 999, but its documents have 2"),
    "rows": (lambda r: scored(r, rows=4), "suite two-step has rows 4, but its documents have 8"),
    "unparsed": (lambda r: scored(r, unparsed=0), "suite two-step has unparsed 0, but its documents have 1"),
    "loss": (lambda r: scored(r, heldout_loss=1.0), "suite two-step has another held-out loss than its documents"),
    "documents": (other_documents, ".parquet: not the file that"),
    "run": (lambda r: r.change(r.score(), EvalRecord, run="other"), "run is 'other', where"),
    "search": (lambda r: r.change(r.search(), SearchRecord, lr=0.5), "chose the rate 0.5, which no ok trial has"),
    "trials": (lambda r: r.change(r.search(), SearchRecord, trials=[]), "no trial of rate 0.001 with seed 100"),
}


@pytest.mark.parametrize(("plant", "said"), DEFECTS.values(), ids=DEFECTS)
def test_a_planted_defect_is_named_and_stays_out_of_partial_tables(
    plant: Callable[[Results], None], said: str, results: Results
) -> None:
    plant(results)
    with pytest.raises(UserError) as told:
        collect(results.plan, results.paths)
    assert said in str(told.value)
    assert "run again" in str(told.value)
    assert len(str(told.value).replace(str(results.paths.root), "results")) < 300
    partial = collect(results.plan, results.paths, failed={})
    of_search = "search.json" in str(told.value)
    failed = partial.runs[partial.runs["status"] == "failed"]
    assert list(failed["run"]) == ([] if of_search else [results.train().parent.name])
    assert partial.trials["search"].nunique() == len(results.plan.searches) - of_search


@pytest.mark.parametrize("record", ["train", "score", "search"])
def test_a_record_changed_by_hand_is_refused(record: str, results: Results) -> None:
    path: Path = getattr(results, record)()
    path.write_text(path.read_text(encoding="utf-8").replace("1", "2", 1), encoding="utf-8")
    with pytest.raises(UserError, match=r"changed since it was written, .*; delete it and run again"):
        collect(results.plan, results.paths)


def test_a_record_with_nan_is_refused(results: Results) -> None:
    path = results.train()
    text = path.read_text(encoding="utf-8")
    value = f'"train_loss": {read(path, TrainRecord).train_loss}'
    assert value in text
    path.write_text(text[: text.rindex(",\n")].replace(value, '"train_loss": NaN') + "\n}\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"^{path}: train_loss: "):
        collect(results.plan, results.paths)


def test_two_versions_of_a_task_of_lm_eval_are_never_in_one_table(results: Results) -> None:
    stock = LmEvalScore(
        suite="stock", task="arc_easy", metric="acc", filter="none", value=0.5, stderr=0.1, higher_is_better=True,
        version="1.0", num_fewshot=0, chat_template=False, items=8, limited=False,
    )  # fmt: skip
    paths = [results.paths.score(run, evaluation) for run, evaluation in results.plan.evaluation_of.items()]
    for path in paths:
        results.change(path, EvalRecord, lm_eval=[stock])
    assert set(collect(results.plan, results.paths).lm_eval["version"]) == {"1.0"}
    results.change(paths[-1], EvalRecord, lm_eval=[stock.model_copy(update={"version": "2.0"})])
    said = f"{paths[-1]}: lm-eval task arc_easy in version 2.0, but 1.0 in {paths[0]}, and one table must not mix two"
    with pytest.raises(UserError) as told:
        collect(results.plan, results.paths)
    assert str(told.value).startswith(said)
    runs = collect(results.plan, results.paths, failed={}).runs.set_index("run")
    failed = runs[runs["status"] == "failed"]
    assert failed.index.tolist() == [paths[-1].parent.parent.name]
    assert said in failed["status_why"].iloc[0]
