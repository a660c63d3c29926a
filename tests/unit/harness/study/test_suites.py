"""Suites of every kind in a study: what is refused, which are scored for which run, and what names they give."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from harness.study.jobs import EvalJob
from harness.study.lm_eval_names import task_names, tasks_folder
from harness.study.plan import resolve_study
from study_files import STUDY, complaint, load

TWO_STEP = "{kind: generated, variant: two-step, seed: 2, rows: 8, scoring: number, max_new_tokens: 8}"
FILE = "test.json"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / FILE).write_text("[]", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("suite", "said"),
    [
        ("scoring: likelihood", "two-step: choices: scoring likelihood needs it: labels or texts"),
        (
            "scoring: likelihood, choices: texts, max_new_tokens: 8",
            "two-step.max_new_tokens: nothing is written under scoring likelihood: remove this key",
        ),
        (
            "scoring: answer, choices: labels, max_new_tokens: 8",
            "two-step.choices: belongs to scoring likelihood; scoring answer reads what is written",
        ),
        ("scoring: answer", "two-step: max_new_tokens: this key is missing; scoring answer needs it"),
        ("scoring: liklihood, choices: texts", "two-step.scoring: must be 'number', "),
        ("scoring: likelihood, choices: text", "two-step.choices: must be 'labels' or 'texts'"),
    ],
)
def test_likelihood_and_written_answers_have_keys_of_their_own(files: Path, suite: str, said: str) -> None:
    text = complaint(files, (TWO_STEP, f"{{kind: files, path: {FILE}, {suite}}}"))
    assert re.sub(r".*suites\.", "", text).startswith(said)


def test_a_task_that_lm_eval_does_not_have_is_refused_with_the_nearest_names(tmp_path: Path) -> None:
    said = complaint(tmp_path, (TWO_STEP, "{kind: lm-eval, task: arc_esy}"))
    assert "suites.two-step.task: lm-eval has no task, group or tag 'arc_esy'; nearest: arc_easy" in said
    for name in ("arc_easy", "mmlu", "ai2_arc"):  # a task, a group, a tag
        assert load(tmp_path, (TWO_STEP, f"{{kind: lm-eval, task: {name}}}")).study == "mine"


def test_the_chat_format_of_a_model_without_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_chat = (TWO_STEP, "{kind: lm-eval, task: piqa, apply_chat_template: true}")
    said = complaint(tmp_path, in_chat)
    assert "suites.two-step.apply_chat_template: model tiny has no chat template: write false" in said
    said = complaint(tmp_path, ("    suites:\n", "    prompt: chat\n    suites:\n"))
    assert "tasks.sums.prompt: model tiny has no chat template: write another prompt" in said
    made = STUDY[STUDY.index("  tiny:\n") : STUDY.index("tasks:\n")]
    hub = (made, f"  tiny: {{kind: hub, repo: org/name, revision: {'a' * 40}}}\n")
    assert load(tmp_path, in_chat, hub).study == "mine"  # not fetched yet: nothing is known
    folder = tmp_path / "mirror" / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setenv("MIRROR", str(tmp_path / "mirror"))
    assert "model tiny has no chat template: write false" in complaint(tmp_path, in_chat, hub)
    (folder / "chat_template.jinja").write_text("", encoding="utf-8")
    assert load(tmp_path, in_chat, hub).study == "mine"


def test_names_come_from_all_of_lm_evals_files() -> None:
    """Of the files that its own index takes seconds to read; a name that is missing here would be refused falsely."""
    from lm_eval.tasks._index import TaskIndex

    folder = tasks_folder()
    assert folder is not None
    for part in ("arc", "mmlu", "acpbench", "glue", "gsm8k", "blimp"):
        assert set(TaskIndex.build([folder / part])) <= task_names()


def test_forgetting_needs_scores_from_before(tmp_path: Path) -> None:
    added = f"forgetting:\n  kept: {TWO_STEP}\nmethods:\n"
    said = complaint(tmp_path, ("methods:\n", added))
    assert "forgetting: nothing is scored before training: add an entry to `methods`, such as `base: {mod" in said
    same = added.replace("kept", "two-step")
    said = complaint(tmp_path, ("methods:\n", f"{same}  base: {{module: base}}\n"))
    assert "forgetting.two-step: task sums has a suite of this label; call it otherwise" in said


def test_a_file_of_forgetting_must_be_there(tmp_path: Path) -> None:
    suite = "{kind: files, path: nowhere.json, scoring: likelihood, choices: texts}"
    added = f"forgetting:\n  kept: {suite}\nmethods:\n  base: {{module: base}}\n"
    assert "forgetting.kept.path: there is no nowhere.json" in complaint(tmp_path, ("methods:\n", added))


def test_more_examples_than_training_rows_are_refused(tmp_path: Path) -> None:
    said = complaint(tmp_path, ("{module: full}", "{module: full, shots: 41}"))
    assert "methods.full.shots: 41 worked examples are more than the 40 training rows of task sums" in said


def test_who_is_scored_on_what(tmp_path: Path) -> None:
    """Shots give an evaluation of their own; forgetting is scored for every run and once for the untrained model."""
    bases = "  base: {module: base, seeds: [0]}\n  base-5: {module: base, seeds: [0], shots: 5}\n"
    study = load(tmp_path, ("methods:\n", f"forgetting:\n  kept: {TWO_STEP}\nmethods:\n{bases}"))
    plan = resolve_study(study)
    scored: dict[str, EvalJob] = {
        run.training.label: plan.evals[plan.evaluation_of[name]] for name, run in plan.runs.items()
    }
    assert {label: job.shots for label, job in scored.items()} == {
        "base": 0, "base-5": 5, "full": 0, "lora": 0, "fixed": 0,
    }  # fmt: skip
    assert [label for label, job in scored.items() if not job.forgetting] == ["base-5"]
    assert scored["base"] == scored["full"]
    assert [suite.label for suite in scored["full"].all_suites] == ["two-step", "kept"]
    assert len(plan.suites) == 2
    assert EvalJob.model_validate_json(json.dumps(scored["base-5"].body())) == scored["base-5"]


def test_what_is_not_asked_for_leaves_names_alone(tmp_path: Path) -> None:
    plain = resolve_study(load(tmp_path))
    shots = resolve_study(load(tmp_path, ("{module: full}", "{module: full, shots: 0}")))
    assert list(plain.evals) == list(shots.evals)
    assert not {"shots", "forgetting"} & set(next(iter(plain.evals.values())).body())


def test_a_task_without_suites_has_no_evaluation(tmp_path: Path) -> None:
    without = STUDY.replace(f"    suites:\n      two-step: {TWO_STEP}\n", "")
    plan = resolve_study(load(tmp_path, text=without))
    assert len(plan.runs) == 6
    assert not plan.evals
    assert not plan.evaluation_of
    assert not plan.suites
