"""What the name of a job depends on: all that decides its record, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import study_files
from harness.study.jobs import KINDS
from harness.study.paths import Paths
from harness.study.plan import outputs, resolve_study
from planned_study import every_name, of_method, plan_of


def test_another_option_adds_runs_and_leaves_all_other_names_alone(tmp_path: Path) -> None:
    before, after = plan_of(tmp_path), plan_of(tmp_path, ("rank: 4", "rank: 8"))
    assert not of_method(before, "lora") & of_method(after, "lora")
    assert len(of_method(after, "lora")) == 2
    changed = {name for name in every_name(before) ^ every_name(after) if "--lora--" not in name}
    assert not changed


def test_an_option_that_says_the_default_is_the_same_run(tmp_path: Path) -> None:
    said = plan_of(tmp_path, ("rank: 4, alpha: 8", "alpha: 8, dropout: 0.0, rank: 4"))
    assert every_name(said) == every_name(plan_of(tmp_path))


@pytest.mark.parametrize(
    ("right", "other"),
    [
        ("steps: 10", "steps: 11"),
        ("loss_on: answer", "loss_on: all"),
        ("train_rows: 40", "train_rows: 41"),
        ("width: 16", "width: 32"),
        ("every_steps: 5", "every_steps: 10"),
    ],
)
def test_what_decides_a_run_decides_its_name(tmp_path: Path, right: str, other: str) -> None:
    assert not set(plan_of(tmp_path).runs) & set(plan_of(tmp_path, (right, other)).runs)


def test_another_grid_renames_searches_and_searched_runs_only(tmp_path: Path) -> None:
    before, after = plan_of(tmp_path), plan_of(tmp_path, ("1.0e-2]", "2.0e-2]"))
    assert not set(before.searches) & set(after.searches)
    assert set(before.runs) & set(after.runs) == of_method(before, "base")


def test_a_new_suite_changes_no_run(tmp_path: Path) -> None:
    old = "    suites:\n"
    suite = "{kind: generated, variant: three-step, seed: 3, rows: 8, scoring: number, max_new_tokens: 8}"
    before, after = plan_of(tmp_path), plan_of(tmp_path, (old, f"{old}      three-step: {suite}\n"))
    assert before.runs.keys() == after.runs.keys()
    assert before.searches.keys() == after.searches.keys()
    assert before.suites.keys() < after.suites.keys()
    assert not before.evals.keys() & after.evals.keys()


def test_how_a_run_is_carried_out_is_no_part_of_its_name(tmp_path: Path) -> None:
    other = "runtime: {threads: 2, checkpoint_every_steps: 7, eval_batch_size: 3}"
    assert every_name(plan_of(tmp_path, ("runtime: {threads: 1}", other))) == every_name(plan_of(tmp_path))


PROBES = ("runtime: {threads: 1}", "runtime: {threads: 1}\nprobes: {batches: 6, rows: 2}")


def test_probes_add_a_job_a_model_and_task_and_rename_none(tmp_path: Path) -> None:
    before, after = plan_of(tmp_path), plan_of(tmp_path, PROBES)
    assert not before.probes
    assert every_name(before) == every_name(after)
    (name,) = after.probes
    assert name.startswith("tiny--sums--")
    assert {o.path for o in outputs(after, Paths())} - {o.path for o in outputs(before, Paths())} == {
        Path("results/probes") / name / "probe.json"
    }


@pytest.mark.parametrize(
    ("right", "other", "same"),
    [
        ("max_length: 48", "max_length: 64", False),
        ("train_rows: 40", "train_rows: 41", False),
        ("width: 16", "width: 32", False),
        ("rows: 2}", "rows: 3}", False),
        ("rows: 2}", "rows: 2, seed: 1}", False),
        # an untrained model knows no method and takes no step
        ("steps: 10", "steps: 11", True),
        ("rank: 4", "rank: 8", True),
        ("full: {module: full}", "full: {module: full, recipe: {max_length: 64}}", True),
    ],
)
def test_what_decides_a_probe_decides_its_name(tmp_path: Path, right: str, other: str, same: bool) -> None:
    edits = (PROBES,) if right not in PROBES[1] else ()
    told = (PROBES[0], PROBES[1].replace(right, other)) if not edits else (right, other)
    after = plan_of(tmp_path, *edits, told)
    assert (after.probes.keys() == plan_of(tmp_path, PROBES).probes.keys()) is same


def test_words_for_the_reader_are_no_part_of_a_name(tmp_path: Path) -> None:
    other = plan_of(
        tmp_path,
        ("study: mine", "study: yours"),
        ("title: A study", "title: Another\nnotes: [a note]"),
        ("full: {module: full}", "full: {module: full, note: the yardstick}"),
    )
    assert every_name(other) == every_name(plan_of(tmp_path))


def test_comments_and_the_order_of_labels_and_keys_rename_nothing(tmp_path: Path) -> None:
    before = resolve_study(study_files.load(tmp_path))
    after = resolve_study(
        study_files.load(
            tmp_path,
            ("  full: {module: full}\n", ""),
            ("\nrecipe:\n  steps: 10\n", "\n  full: {module: full}  # last now\nrecipe:\n"),
            ("  schedule: linear\n", "  schedule: linear\n  steps: 10\n"),
            ("{rank: 4, alpha: 8}", "{alpha: 8, rank: 4}"),
        )
    )
    assert list(after.runs) != list(before.runs), "the order is another one"
    for kind in KINDS:
        assert after.jobs(kind).keys() == before.jobs(kind).keys()


def test_two_studies_share_the_runs_they_have_in_common(tmp_path: Path) -> None:
    one = plan_of(tmp_path)
    other = plan_of(
        tmp_path,
        ("study: mine", "study: yours"),
        ("seeds: [0, 1]", "seeds: [1, 2]"),
        ("  lora: {module: lora, options: {rank: 4, alpha: 8}}\n", "  lisa: {module: lisa}\n"),
    )
    common = {name.rsplit("--", 1)[0] for name in set(one.runs) & set(other.runs)}
    assert common == {"tiny--sums--base--seed0", "tiny--sums--full--seed1"}
    assert set(one.models) == set(other.models)


def test_a_method_that_changes_the_recipe_wears_a_dagger_and_another_name(tmp_path: Path) -> None:
    before = plan_of(tmp_path)
    change = "full: {module: full, recipe: {weight_decay: 0.1, max_grad_norm: null}}"
    after = plan_of(tmp_path, ("full: {module: full}", change))
    for run in after.runs.values():
        daggers = ("max_grad_norm", "weight_decay") if run.training.label == "full" else ()
        assert run.training.recipe_changes == daggers
    assert {name for name in after.runs if name not in before.runs} == of_method(after, "full")
    changed = next(run.training.recipe for run in after.runs.values() if run.training.label == "full")
    assert (changed.weight_decay, changed.max_grad_norm, changed.steps) == (0.1, None, 10)


def test_a_change_that_changes_nothing_still_wears_the_dagger(tmp_path: Path) -> None:
    # it would follow the study's recipe no more if that changed
    after = plan_of(tmp_path, ("full: {module: full}", "full: {module: full, recipe: {steps: 10}}"))
    assert of_method(after, "full").isdisjoint(plan_of(tmp_path).runs)


def test_a_tasks_recipe_is_for_all_methods_and_wears_no_dagger(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, ("    suites:\n", "    recipe: {steps: 20}\n    suites:\n"))
    assert {run.training.recipe.steps for run in plan.runs.values()} == {20}
    assert {run.training.recipe_changes for run in plan.runs.values()} == {()}
