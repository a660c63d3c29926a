"""Which exported models stay, when the others are removed, and what is said where one is wanted that is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness.__main__ import main
from harness.errors import UserError
from harness.progress import STUDY_FILE
from harness.records import atomic
from harness.study import keep, needs
from harness.study.jobs import TRAIN
from harness.study.paths import Paths
from harness.study.plan import Plan, resolve_study
from harness.study.spec import Runtime, Study
from study_files import STUDY, load, written

RUNTIME = (
    "observation: {every_steps: 5, rows: 4}\n",
    "observation: {{every_steps: 5, rows: 4}}\nruntime: {{keep: {}}}\n",
)
BASE = ("  full: {module: full}\n", "  base: {module: base, seeds: [0]}\n  full: {module: full}\n")
SUITE = "{kind: generated, variant: two-step, seed: 2, rows: 8, scoring: number, max_new_tokens: 8}"
UNSCORED = (f"    suites:\n      two-step: {SUITE}\n", "")


def keeping(value: str) -> tuple[str, str]:
    return RUNTIME[0], RUNTIME[1].format(value)


def study_of(folder: Path, *edits: tuple[str, str]) -> Plan:
    study: Study = load(folder, *edits)
    return resolve_study(study)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path / "results")


def labels(names: set[str]) -> list[str]:
    """Method and seed of runs."""
    return sorted("--".join(name.split("--")[2:4]) for name in names)


def trained(paths: Paths, run: str, *, checkpoint: str | None = None) -> Path:
    """A run's record and its exported model, as training leaves them."""
    model = keep.exported(paths, run)
    atomic.write_json(paths.output(TRAIN, run), {"checkpoint": checkpoint or str(model), "status": "ok"})
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(bytes(1000))
    return model


def scored(plan: Plan, paths: Paths, run: str, status: str = "ok") -> None:
    stamp: dict[str, Any] = {"provenance": {"source_sha256": ""}, "status": status}
    atomic.write_json(paths.score(run, plan.evaluation_of[run]), stamp)


def test_what_stays_is_none_all_or_the_last_seed_of_each_method(tmp_path: Path, paths: Paths) -> None:
    every = ["fixed--seed0", "fixed--seed1", "full--seed0", "full--seed1", "lora--seed0", "lora--seed1"]
    kept = {v: labels(keep.kept(study_of(tmp_path, BASE, keeping(v)), paths)) for v in ("none", "last", "all")}
    assert kept == {"none": [], "last": [name for name in every if name.endswith("seed1")], "all": every}


def test_without_a_word_models_above_a_gibibyte_do_not_stay(
    tmp_path: Path, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = study_of(tmp_path)
    assert len(keep.kept(plan, paths)) == 6
    size = needs.weight_bytes(next(iter(plan.runs.values())).training, paths)
    monkeypatch.setattr(keep, "LARGE_BYTES", size)
    assert len(keep.kept(plan, paths)) == 6
    monkeypatch.setattr(keep, "LARGE_BYTES", size - 1)
    assert not keep.kept(plan, paths)
    # a model that lies there is as large as it is
    run = next(iter(plan.runs))
    trained(paths, run)
    assert keep.kept(plan, paths) == {run}


def test_keep_is_no_part_of_any_name(tmp_path: Path) -> None:
    assert study_of(tmp_path).runs.keys() == study_of(tmp_path, keeping("none")).runs.keys()
    assert Runtime().keep is None


def test_a_model_goes_once_every_evaluation_has_its_record(
    tmp_path: Path, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = study_of(tmp_path, keeping("none"))
    run, other = list(plan.runs)[:2]
    model = trained(paths, run)
    scored(plan, paths, run)
    assert keep.remove_unneeded(run, paths, scored=True) == 0, "outside a study nothing is removed"
    monkeypatch.setenv(STUDY_FILE, str(written(tmp_path, keeping("none"))))
    assert keep.remove_unneeded(run, paths, scored=False) == 0, "the record may be of a model before this one"
    scored(plan, paths, run, "oom")
    assert keep.remove_unneeded(run, paths, scored=True) == 0, "it can be tried again with smaller batches"
    assert model.is_dir()
    scored(plan, paths, run)
    assert keep.remove_unneeded(run, paths, scored=True) == 1000
    assert not model.exists()
    assert paths.output(TRAIN, run).is_file()
    trained(paths, other)
    assert keep.remove_unneeded(other, paths, scored=True) == 0, "not scored yet"
    # a run of another study, and a config that is being edited
    assert keep.remove_unneeded("stranger", paths, scored=True) == 0
    (tmp_path / "mine.yaml").write_text("study: [", encoding="utf-8")
    scored(plan, paths, other)
    assert keep.remove_unneeded(other, paths, scored=True) == 0


def test_a_model_that_nothing_scores_goes_after_training_and_a_kept_one_never(
    tmp_path: Path, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value, stays in (("all", True), ("none", False)):
        monkeypatch.setenv(STUDY_FILE, str(written(tmp_path, UNSCORED, keeping(value))))
        run = next(iter(study_of(tmp_path, UNSCORED, keeping(value)).runs))
        model = keep.exported(paths, run)
        if not model.exists():
            trained(paths, run)
        keep.remove_unneeded(run, paths, scored=False)
        assert model.is_dir() is stays


def test_what_is_gone_is_named_with_the_command_that_trains_it_again(
    tmp_path: Path, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = study_of(tmp_path, BASE)
    runs = keep.exporting(plan)
    base = next(name for name in plan.runs if "--base--" in name)
    atomic.write_json(paths.output(TRAIN, base), {"checkpoint": "somewhere/else", "status": "ok"})
    for run in runs[:3]:
        trained(paths, run)
    assert keep.gone(plan, paths) == []
    for run in runs[:2]:
        keep.exported(paths, run).joinpath("model.safetensors").unlink()
        keep.exported(paths, run).rmdir()
    scored(plan, paths, runs[0])
    assert keep.gone(plan, paths) == [runs[1]]
    monkeypatch.setenv(STUDY_FILE, "my configs/mine.yaml")
    with pytest.raises(UserError) as said:
        keep.check_exported(runs[1], str(keep.exported(paths, runs[1])), paths)
    assert str(said.value).endswith(
        f": snakemake --cores 1 --config 'STUDY=my configs/mine.yaml' --force {paths.output(TRAIN, runs[1])}"
    )
    assert "\n" not in str(said.value)
    # these are there, or were never this run's to export
    keep.check_exported(runs[2], str(keep.exported(paths, runs[2])), paths)
    keep.check_exported(base, "somewhere/else", paths)
    keep.check_exported(base, None, paths)


def test_plan_tells_what_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = written(tmp_path)
    run = next(iter(study_of(tmp_path).runs))
    stamp = {"provenance": {"source_sha256": "", "sources": {}}, "status": "ok"}
    atomic.write_json(Paths().output(TRAIN, run), stamp | {"checkpoint": str(keep.exported(Paths(), run))})
    assert main(["plan", "--config", str(config)]) == 0
    assert "gone: 1 runs that are to be scored have no model any more" in capsys.readouterr().out


def test_a_word_that_keep_does_not_know_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"runtime\.keep"):
        load(tmp_path, keeping("some"))
    assert STUDY.count("runtime") == 0
