"""A failed job takes no other run's tables with it: what is there is shown, what is missing has its reason."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from harness.__main__ import main
from harness.checking.contract import Case
from harness.checking.tiny import tiny_inputs
from harness.errors import OWN_FAULT
from harness.records import atomic
from harness.records.code import ROWS as ROOTS
from harness.records.inputs import ModelRecord, RowsRecord
from harness.records.provenance import provenance
from harness.reporting import collecting
from harness.reporting.failures import failed_runs
from harness.study.jobs import MODEL, ROWS, SEARCH, TRAIN
from harness.study.last_words import reason, status_of
from harness.study.paths import Paths
from harness.study.plan import Plan, resolve_study
from study_files import load, written


def log(paths: Paths, rule: str, job: str, *lines: str) -> None:
    atomic.write_text(paths.root / "logs" / rule / f"{job}.log", "".join(f"{line}\n" for line in lines))


def there(plan: Plan, paths: Paths) -> None:
    """Models and rows have been made."""
    made = provenance(roots=ROOTS, inputs={})
    for name in plan.models:
        model = ModelRecord(name=name, folder="m", files_sha256={}, parameters=1, wall_s=1.0,
                            provenance=made)  # fmt: skip
        atomic.write_json(paths.output(MODEL, name), model.model_dump(mode="json"))
    for name in plan.rows:
        rows = RowsRecord(name=name, files_sha256={}, rows={}, provenance=made)
        atomic.write_json(paths.output(ROWS, name), rows.model_dump(mode="json"))


def test_a_line_of_code_below_a_warning_is_not_taken_for_the_reason(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "results")
    warned = (
        "[ 3%] search full: trial 2 of 6",
        "loop.py:242: UserWarning: layers are near uniform",
        "  method.prepare()",
    )
    log(paths, "search", "a", *warned)
    assert reason(paths, "search", "a").startswith("search did not finish: [ 3%] search full: trial 2 of 6 (")
    log(paths, "search", "b", *warned[1:])
    assert "UserWarning: layers are near uniform" in reason(paths, "search", "b")
    log(
        paths, "search", "c", "Traceback (most recent call last):", '  File "x.py", line 1', "    f()", "ValueError: no"
    )
    assert reason(paths, "search", "c").startswith("search did not finish: ValueError: no (")


def test_the_first_job_without_output_is_the_reason(tmp_path: Path) -> None:
    plan, paths = resolve_study(load(tmp_path)), Paths(tmp_path / "results")
    by_method = {f"{run.training.label} {run.seed}": name for name, run in plan.runs.items()}
    assert set(failed_runs(plan, paths).values()) == {"pretrain did not run"}
    there(plan, paths)
    log(paths, "train", by_method["fixed 0"], "Traceback", "ValueError: shapes differ", f"harness train: {OWN_FAULT}")
    log(paths, "train", by_method["fixed 1"], "harness train: rows.json: no rows", "")
    full = next(run.search_job() for run in plan.runs.values() if run.training.label == "full")
    assert full is not None
    log(paths, "search", full.name, "search full: 8/24 steps, 6.7 s/step, 1 min 48 s left, loss 2.343")
    lora = next(run.search_job() for run in plan.runs.values() if run.training.label == "lora")
    assert lora is not None
    atomic.write_text(paths.output(SEARCH, lora.name), "{}")
    atomic.write_text(paths.output(TRAIN, by_method["lora 1"]), "{}")
    found = failed_runs(plan, paths)
    told = {method: found.get(name, "").partition(" (")[0] for method, name in by_method.items()}
    assert told == {
        "fixed 0": "train failed: ValueError: shapes differ",
        "fixed 1": "train failed: harness train: rows.json: no rows",
        "full 0": "search did not finish: search full: 8/24 steps, 6.7 s/step, 1 min 48 s left, loss 2.343",
        "full 1": "search did not finish: search full: 8/24 steps, 6.7 s/step, 1 min 48 s left, loss 2.343",
        "lora 0": "train did not run",
        "lora 1": "",
    }
    assert [status_of(why) for why in sorted(found.values())] == [*["not run"] * 3, *["failed"] * 2]
    assert found[by_method["full 0"]].endswith(f"({paths.root / 'logs' / 'search' / full.name}.log)")


def test_what_is_there_has_its_tables_and_what_is_missing_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(tmp_path)
    monkeypatch.chdir(tmp_path)
    plan, paths = resolve_study(load(tmp_path)), Paths()
    there(plan, paths)
    record = Case("full", {}, tiny_inputs(tmp_path / "inputs"), tmp_path / "case").standard()
    steps = (tmp_path / "case" / "standard" / "steps.jsonl").read_text(encoding="utf-8")
    for name, run in plan.runs.items():
        if run.training.label == "fixed":
            labels = {"name": name, "model": "tiny", "task": "sums", "method": "fixed", "seed": run.seed, "notes": []}
            labels |= {"lr": run.lr, "files_sha256": {}}
            atomic.write_text(paths.run(name) / "steps.jsonl", steps)
            atomic.write_json(paths.output(TRAIN, name), record.model_copy(update=labels).model_dump(mode="json"))
    monkeypatch.setattr(collecting, "PART_ROWS", 1)  # tables of many parts are as whole
    assert main(["partial", "--config", str(config)]) == 0
    said = capsys.readouterr().err
    out = Path("results/mine/partial")
    assert f"2 of 6 runs are there: {out / 'report.html'}" in said
    assert len(re.findall("^missing: ", said, re.MULTILINE)) == 1, "one reason, one line"
    assert "and 3 more: search did not run" in said
    runs = pd.read_parquet(out / "runs.parquet").set_index("method")
    assert set(runs.loc[["full", "lora"], "status"]) == {"not run"}
    assert set(runs.loc["fixed", "status"]) == {"ok"}
    assert set(runs.loc["fixed", "notes"]) == {"not scored: evaluate did not run"}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "2 of 6 runs are ok; 4 not run" in page
    assert "lora on tiny, sums, seeds 0, 1: not run — search did not run" in page


def test_where_nothing_is_there_only_the_reasons_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = written(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["partial", "--config", str(config)]) == 0
    assert "and 5 more: pretrain did not run" in capsys.readouterr().err
    assert not Path("results/mine").exists()
