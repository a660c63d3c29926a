"""A study resolved into jobs: the grid, specs that are never touched again, each job's state."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from harness.__main__ import main
from harness.errors import UserError
from harness.study import needs
from harness.study.config import load_study
from harness.study.jobs import KINDS, TRAIN, EvalJob, Job
from harness.study.paths import Paths
from harness.study.plan import open_study, outputs, processes_of, resolve_study
from harness.study.stale import current
from house import ROOT
from planned_study import every_name, plan_of, written

from baselines import method_names

# ---------------------------------------------------------------- speed


def test_planning_imports_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from harness.__main__ import main; "
        f"code = main(['plan', '--config', {str(written(tmp_path))!r}]); "
        "heavy = {'torch', 'transformers', 'pandas', 'numpy', 'matplotlib'} & set(sys.modules); "
        "sys.exit(f'{code}, imported {heavy}' if code or heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_thousand_runs_are_planned_in_seconds(tmp_path: Path) -> None:
    seeds = f"seeds: {[s for s in range(501) if s != 100]}"
    path = written(tmp_path, ("seeds: [0, 1]", seeds))
    started = time.perf_counter()
    plan = resolve_study(load_study(path))
    spent = time.perf_counter() - started
    assert len(plan.runs) == 1001
    # measured: 0.2 s on one core of a busy two-core machine; the limit leaves room for a slow one
    assert spent < 5
    print(f"{len(plan.runs)} runs planned in {spent:.2f} s")


# ---------------------------------------------------------------- the grid


def test_a_study_is_models_times_tasks_times_methods_times_seeds(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert {name.rsplit("--", 1)[0] for name in plan.runs} == {
        "tiny--sums--base--seed0",
        "tiny--sums--full--seed0",
        "tiny--sums--full--seed1",
        "tiny--sums--lora--seed0",
        "tiny--sums--lora--seed1",
    }
    assert [len(kind) for kind in (plan.models, plan.rows, plan.suites, plan.evals)] == [1, 1, 1, 1]
    assert set(plan.evaluation_of) == set(plan.runs)


def test_the_seeds_of_a_method_share_one_search_and_the_base_model_has_none(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    assert {name.rsplit("--", 1)[0] for name in plan.searches} == {"tiny--sums--full", "tiny--sums--lora"}
    for run in plan.runs.values():
        search = run.search_job()
        if run.training.label == "base":
            assert (search, run.lr, run.search) == (None, None, None)
        else:
            assert search is not None
            assert search.name in plan.searches


def test_a_method_with_a_rate_of_its_own_is_not_searched(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ("full: {module: full}", "full: {module: full, lr: 0.01}"))
    assert {name.rsplit("--", 1)[0] for name in plan.searches} == {"tiny--sums--lora"}
    assert {run.lr for run in plan.runs.values() if run.training.label == "full"} == {0.01}


# ---------------------------------------------------------------- specs on disk


def spec_files(root: Path) -> dict[Path, type[Job]]:
    return {path: kind.spec for kind in KINDS for path in root.glob(kind.spec_file.format(name="*"))}


def test_every_spec_file_reads_back_as_the_job_it_is_named_after(tmp_path: Path) -> None:
    plan = open_study(written(tmp_path), Paths(tmp_path / "results"))
    files = spec_files(tmp_path / "results")
    assert len(files) == len(every_name(plan))
    for path, job in files.items():
        label = path.stem if job is EvalJob else path.parent.name
        assert job.model_validate_json(path.read_bytes()).name == label


def test_a_spec_is_written_once_and_never_touched_again(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "results")
    open_study(written(tmp_path), paths)
    first = {path: path.stat() for path in spec_files(paths.root)}
    # even one that somebody changed: what was run stays on record
    changed = next(iter(first))
    changed.write_text("{}")
    first[changed] = changed.stat()
    time.sleep(0.02)
    open_study(written(tmp_path, ("rank: 4", "rank: 8")), paths)
    after = spec_files(paths.root)
    assert len(after) == len(first) + 3  # two runs and a search of the new rank
    for path, stat in first.items():
        assert (path.stat().st_mtime_ns, path.stat().st_ino) == (stat.st_mtime_ns, stat.st_ino)


def test_a_lost_spec_is_written_anew(tmp_path: Path) -> None:
    paths = Paths(tmp_path / "results")
    open_study(written(tmp_path), paths)
    lost = next(path for path in spec_files(paths.root) if path.parent.parent.name == "runs")
    text = lost.read_text()
    lost.unlink()
    open_study(written(tmp_path), paths)
    assert lost.read_text() == text


def test_a_dry_run_writes_nothing_and_needs_no_data(tmp_path: Path) -> None:
    files = "{kind: files, paths: [nowhere.json], seed: 1, validation_rows: 8}"
    generated = "{kind: generated, family: arithmetic, seed: 1, train_rows: 40, validation_rows: 8}"
    plan = open_study(written(tmp_path, (generated, files)), Paths(tmp_path / "results"), dry_run=True)
    assert len(plan.runs) == 5
    assert not (tmp_path / "results").exists()


# ---------------------------------------------------------------- the plan stage


def test_the_plan_stage_tells_done_from_stale_from_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path, paths = written(tmp_path), Paths()
    plan = open_study(path, paths)
    trained = [output for output in outputs(plan, paths) if output.kind is TRAIN]
    done, stale = trained[0], trained[1]
    for output, digest in ((done, current(done).sha256), (stale, "0" * 64)):
        record = {"status": "ok", "provenance": {"source_sha256": digest}}
        output.path.write_text(json.dumps(record))
    assert main(["plan", "--config", str(path)]) == 0
    shown = capsys.readouterr().out
    states = {}
    for line in shown.splitlines():
        for output in trained:
            if output.name in line:
                states[output.name] = line.split("train")[0].strip()
    assert states.pop(done.name) == "done"
    assert states.pop(stale.name) == "stale"
    assert Counter(states.values()) == {"to do": 3}
    assert "mine: 1 models x 1 tasks x 3 methods = 5 runs, 2 searches" in shown
    assert "train    1 done, 1 stale, 3 to do" in shown
    assert "stale: made by other code than today's" in shown
    assert "with the number of records: files that the record does not name (1)\n" in shown


def test_the_plan_stage_names_the_files_that_made_records_stale_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path, paths = written(tmp_path), Paths()
    plan = open_study(path, paths)
    for output in outputs(plan, paths):
        if output.kind is not TRAIN:
            continue
        sources = dict(current(output).sources)
        sources["harness.training.loop"] = "0" * 12
        sources["baselines.gone"] = "1" * 12
        if output.job.training.module == "lora":
            del sources["baselines.lora"]
        provenance = {"source_sha256": "0" * 64, "sources": sources}
        output.path.write_text(json.dumps({"status": "ok", "provenance": provenance}))
    assert main(["plan", "--config", str(path)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "what differs" in line]
    assert line.endswith(": baselines.gone (5), harness.training.loop (5), baselines.lora (2)")


def test_the_plan_stage_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--config", str(written(tmp_path)), "--all"]) == 0
    shown = capsys.readouterr().out
    assert "stale" not in shown
    assert all(
        name in shown
        for kind in ("models", "rows", "suites", "searches", "runs")
        for name in vars(plan_of(tmp_path))[kind]
    )
    assert [p.name for p in tmp_path.iterdir()] == ["mine.yaml"]


STUDIES = sorted(path for path in (ROOT / "config").glob("*.yaml") if path.stem != "efficiency")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_of_the_project_resolves(path: Path) -> None:
    plan = resolve_study(load_study(path, inputs_needed=False))
    assert {run.training.label for run in plan.runs.values()} == set(plan.study.methods)


def test_the_zoo_shares_runs_with_the_embedded_study_and_names_every_method_file() -> None:
    zoo, embedded = (resolve_study(load_study(ROOT / "config" / f"{n}.yaml")) for n in ("zoo", "embedded"))
    shared = {run.training.label for name, run in zoo.runs.items() if name in embedded.runs}
    assert shared == set(embedded.study.methods)
    assert {entry.module for entry in zoo.study.methods.values()} == set(method_names())


# ---------------------------------------------------------------- several processes


def test_gpus_are_the_studys_or_the_entrys_and_in_no_name(tmp_path: Path) -> None:
    plain = plan_of(tmp_path)
    study = ("runtime: {threads: 1}", "runtime: {threads: 1, gpus: 2}")
    plan = plan_of(tmp_path, study, ("lora: {module: lora,", "lora: {module: lora, gpus: 1,"))
    assert every_name(plan) == every_name(plain)
    counts = {run.training.label: processes_of(plan.study, run.training) for run in plan.runs.values()}
    assert counts == {"base": 1, "full": 2, "lora": 1}
    (training,) = {
        run.training.label: run.training for run in plan.runs.values() if run.training.label == "full"
    }.values()
    one, two = (needs.of_training(training, Paths(), processes=count) for count in (1, 2))
    assert (one.gpus, two.gpus, two.mem_mb > 1.9 * one.mem_mb) == (0, 0, True)
    on_gpu = training.model_copy(update={"recipe": training.recipe.model_copy(update={"device": "cuda"})})
    assert needs.of_training(on_gpu, Paths(), processes=2).gpus == 2


@pytest.mark.parametrize(
    ("edit", "key"),
    [
        (("runtime: {threads: 1}", "runtime: {threads: 1, gpus: 3}"), "runtime.gpus"),
        (("full: {module: full}", "full: {module: full, gpus: 3}"), "methods.full.gpus"),
    ],
)
def test_processes_that_cannot_share_a_step_are_refused(edit: tuple[str, str], key: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        plan_of(tmp_path, edit)
    assert str(refused.value) == (
        f"{key}: 3 processes cannot share the 2 micro-batches of a step on task sums evenly: choose batch_size / "
        "micro_batch_size as a multiple of it"
    )
