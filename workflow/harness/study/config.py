"""Reads a study's config file: its own keys, every method's options, every merged recipe, every input path."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from baselines import find_method
from baselines.method import Method, Recipe
from harness.errors import UserError
from harness.study import sources, spec
from harness.study.lm_eval_names import task_names, unknown_task
from harness.study.paths import RESERVED, resolve
from harness.study.strict_yaml import KeyPath, Source, read_yaml, validate

_FROM = "paths count from the folder you start in"


def load_study(path: Path, *, inputs_needed: bool = True) -> spec.Study:
    """Read and check a study: its own keys, every method's options, every merged recipe, every input path.

    Raises:
        ConfigError: the first thing that is wrong.
    """
    source = read_yaml(path)
    if "numerics" in source.value:
        raise source.error((), f"this is an efficiency study: python -m harness efficiency --config {path}")
    study: spec.Study = validate(spec.Study, source.value, source)
    if study.study in RESERVED:
        raise source.error(("study",), f"{study.study!r} is a folder of its own under results/: choose another label")
    for label, entry in study.methods.items():
        method, _ = method_of(study, label, source)
        if method.TRAINS and entry.lr is None and study.search is None:
            raise source.error(("methods", label), "no learning rate: give it an lr, or the study a search")
        if not method.TRAINS and entry.lr is not None:
            raise source.error(("methods", label, "lr"), f"{entry.module} takes no step: remove this key")
        for task in study.tasks:
            recipe_of(study, task, label, source)
        for task, rows in ((task, getattr(entry.train, "train_rows", None)) for task, entry in study.tasks.items()):
            if rows is not None and entry.shots > rows:
                text = f"{entry.shots} worked examples are more than the {rows} training rows of task {task}"
                raise source.error(("methods", label, "shots"), text)
    for key, file in (("published", study.published), ("claims", study.claims)):
        if file is not None and not Path(file).is_file():
            raise source.error((key,), f"there is no file {file}; {_FROM}")
    if inputs_needed:
        _check_paths(study, source)
        _check_lm_eval(study, source)
        _check_chat(study, source)
    return study


def method_of(study: spec.Study, label: str, source: Source | None = None) -> tuple[type[Method], dict[str, Any]]:
    """The method class of an entry and its complete options."""
    source = source or Source(Path("study"), {}, {})
    entry = study.methods[label]
    try:
        method = find_method(entry.module)
    except LookupError as error:
        raise source.error(("methods", label, "module"), str(error)) from None
    options = validate(method.Config, entry.options, source, ("methods", label, "options"))
    return method, options.model_dump(mode="json")


def task_recipe(study: spec.Study, task: str, source: Source | None = None) -> Recipe:
    """The study's recipe, overridden by the task's changes: what does not depend on a method."""
    return _laid_over(study.recipe, study.tasks[task].recipe, source, ("tasks", task, "recipe"))


def _laid_over(recipe: Recipe, change: dict[str, Any], source: Source | None, key: KeyPath) -> Recipe:
    merged = recipe.model_dump(mode="json") | change  # shallow merge: lists are replaced whole
    laid: Recipe = validate(Recipe, merged, source or Source(Path("study"), {}, {}), key)
    return laid


def recipe_of(study: spec.Study, task: str, label: str, source: Source | None = None) -> Recipe:
    """The study's recipe, overridden by the task's changes, then by the method entry's changes."""
    source = source or Source(Path("study"), {}, {})
    places: list[KeyPath] = [("methods", label, "recipe"), ("tasks", task, "recipe"), ("recipe",)]
    recipe = _laid_over(task_recipe(study, task, source), study.methods[label].recipe, source, places[0])
    for kept, one, rule, other in (
        (recipe.batch_size % recipe.micro_batch_size == 0, "micro_batch_size", "does not divide", "batch_size"),
        (recipe.warmup_steps < recipe.steps, "warmup_steps", "must be below", "steps"),
        (
            (recipe.compute_dtype, recipe.weight_dtype) != ("fp32", "bf16"),
            "compute_dtype",
            "needs fp32 weights: leave it out, or change",
            "weight_dtype",
        ),
    ):
        if not kept:  # report the line of the last change: the study's own recipe may be valid
            at = next(((*p, k) for p in places for k in (one, other) if (*p, k) in source.lines), ("recipe", one))
            text = f"{one} {getattr(recipe, one)} {rule} {other} {getattr(recipe, other)}"
            raise source.error(at, f"{text} (task {task}, method {label})")
    return recipe


def _check_paths(study: spec.Study, source: Source) -> None:
    wanted: list[tuple[KeyPath, str]] = []
    for label, model in study.models.items():
        wanted += [(("models", label, "path"), model.path)] if isinstance(model, sources.LocalModel) else []
    for label, task in study.tasks.items():
        if isinstance(task.train, sources.FileRows):
            wanted += [(("tasks", label, "train", "paths", i), p) for i, (p, _) in enumerate(task.train.files)]
        if isinstance(task.train, sources.ReadRows):
            wanted += [(("tasks", label, "train", "without", i), p) for i, p in enumerate(task.train.without)]
    wanted += [((*key, "path"), suite.path) for key, suite in _suites(study) if isinstance(suite, sources.FileSuite)]
    for key, text in wanted:
        try:
            path = resolve(text)
        except UserError as error:
            named = [f"{name} is {what}" for name, what in study.inputs.items() if f"${{{name}}}" in text]
            raise source.error(key, "; ".join([str(error), *named])) from None
        if not path.exists():
            mend = f"correct the variable in {text}" if "${" in text else _FROM
            raise source.error(key, f"there is no {path}; {mend}")


def _check_lm_eval(study: spec.Study, source: Source) -> None:
    for key, suite in _suites(study):
        if isinstance(suite, sources.LmEvalSuite) and (known := task_names()) and suite.task not in known:
            raise source.error((*key, "task"), unknown_task(suite.task, known))


def _check_chat(study: spec.Study, source: Source) -> None:
    """Refuse the chat format for a model that is known to have none; of one still to be fetched nothing is known."""
    asked: list[tuple[KeyPath, str]] = [
        (("tasks", task, "prompt"), "write another prompt (alpaca, plain, llm-adapters)")
        for task, entry in study.tasks.items()
        if entry.prompt == "chat"
    ]
    asked += [
        ((*key, "apply_chat_template"), "write false")
        for key, suite in _suites(study)
        if isinstance(suite, sources.LmEvalSuite) and suite.apply_chat_template
    ]
    for label, model in study.models.items() if asked else ():
        if _has_no_chat_template(model):
            key, mend = asked[0]
            raise source.error(key, f"model {label} has no chat template: {mend}")


def _has_no_chat_template(model: sources.ModelSource) -> bool:
    if isinstance(model, sources.PretrainedHere):
        return True
    mirror = os.environ.get("MIRROR")
    folder = resolve(model.path) if isinstance(model, sources.LocalModel) else Path(mirror or "") / model.repo
    settings = folder / "tokenizer_config.json"
    if not settings.is_file():
        return False
    inside = "chat_template" in json.loads(settings.read_text(encoding="utf-8"))
    return not inside and not any(folder.glob("chat_template.*"))


def _suites(study: spec.Study) -> Iterator[tuple[KeyPath, sources.SuiteSource]]:
    """Every suite with its key."""
    for task, entry in study.tasks.items():
        yield from ((("tasks", task, "suites", label), suite) for label, suite in entry.suites.items())
    yield from ((("forgetting", label), suite) for label, suite in study.forgetting.items())


def changed_recipe_keys(study: spec.Study, label: str) -> Sequence[str]:
    """Recipe keys that a method's entry changes; every table marks the method with a changed_recipe_keys."""
    return sorted(study.methods[label].recipe)
