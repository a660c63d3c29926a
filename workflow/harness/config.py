"""Reads a study's config file strictly, and resolves it into jobs.

Every complaint is one line that names the file, the line, the key and the mend. YAML 1.1 reads `1e-5` as text and `no`
as false: such values are refused where a number or a word is wanted, never guessed.
"""

from __future__ import annotations

import difflib
import json
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from baselines.method import Method, Recipe, find_method
from harness import spec
from harness.places import RESERVED, resolve

KeyPath = tuple[str | int, ...]


class ConfigError(Exception):
    """One line for the user: file, line, key, what is wrong and how to mend it."""


@dataclass(frozen=True)
class Source:
    """A parsed YAML file and the line of each of its keys."""

    path: Path
    value: dict[str, Any]
    lines: dict[KeyPath, int]

    def error(self, key: KeyPath, message: str) -> ConfigError:
        """A complaint about `key`, with the line of the nearest key that is in the file."""
        known = key
        while known and known not in self.lines:
            known = known[:-1]
        line = self.lines.get(known, 1)
        dotted = ".".join(str(part) for part in key)
        return ConfigError(f"{self.path}:{line}: {dotted + ': ' if dotted else ''}{message}")


def read_yaml(path: Path) -> Source:
    """Parse one YAML mapping; duplicate keys, tags and keys that are not text are refused.

    Raises:
        ConfigError: also for a missing or an empty file.
    """
    if not path.is_file():
        near = sorted(p.as_posix() for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such file" + (f"; there are {', '.join(near)}" if near else ""))
    lines: dict[KeyPath, int] = {}
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{path}:{line}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if node is None:
        raise ConfigError(f"{path}:1: the file is empty; copy config/embedded.yaml and edit it")
    value = _build(node, (), lines, path)
    if not isinstance(value, dict):
        raise ConfigError(f"{path}:1: a study is a mapping of keys, this is a {type(value).__name__}")
    return Source(path, value, lines)


def _build(node: yaml.Node, key: KeyPath, lines: dict[KeyPath, int], path: Path) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(key, line)
    if isinstance(node, yaml.MappingNode):
        built: dict[str, Any] = {}
        for key_node, value_node in node.value:
            at = key_node.start_mark.line + 1
            name = yaml.SafeLoader("").construct_object(key_node)
            if not isinstance(name, str):
                raise ConfigError(f"{path}:{at}: YAML reads the key {key_node.value!r} as {name!r}: put it in quotes")
            if name in built:
                raise ConfigError(f"{path}:{at}: the key {name!r} stands twice in the same mapping")
            lines[(*key, name)] = at
            built[name] = _build(value_node, (*key, name), lines, path)
        return built
    if isinstance(node, yaml.SequenceNode):
        return [_build(child, (*key, i), lines, path) for i, child in enumerate(node.value)]
    if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.endswith(("binary", "timestamp")):
        raise ConfigError(
            f"{path}:{line}: {'.'.join(map(str, key))}: the YAML tag {node.tag!r} is not used here: write a plain value"
        )
    return yaml.SafeLoader("").construct_object(node)


def validate(model: type[BaseModel], value: Any, source: Source, at: KeyPath = ()) -> Any:
    """Validate strictly; the first complaint becomes a `ConfigError`.

    Args:
        model: the pydantic model.
        value: plain JSON-like data.
        source: for the line numbers.
        at: where in the file `value` stands.
    """
    try:
        return model.model_validate_json(json.dumps(value))
    except ValidationError as error:
        first = error.errors()[0]
        # pydantic puts the tag of a discriminated union into the location; it is no key of the file
        where = tuple(
            part for part in first["loc"] if not (isinstance(part, str) and part in _TAGS) or part in _keys(value)
        )
        raise source.error((*at, *where), _mend(first, model, where)) from None


_TAGS = {"pretrain", "local", "hub", "generated", "files"}


def _keys(value: Any) -> set[str]:
    if isinstance(value, dict):
        return set(value) | {k for child in value.values() for k in _keys(child)}
    if isinstance(value, list):
        return {k for child in value for k in _keys(child)}
    return set()


def _mend(error: Any, model: type[BaseModel], where: KeyPath) -> str:
    kind, given = error["type"], error.get("input")
    if kind == "extra_forbidden":
        valid = _fields_at(model, where[:-1])
        near = difflib.get_close_matches(str(where[-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(sorted(valid))}"
        return f"unknown key; {hint}"
    if kind in {"float_type", "int_type"} and isinstance(given, str):
        try:
            number = float(given)
        except ValueError:
            return f"a number is wanted, not the text {given!r}"
        mantissa, _, exponent = f"{number:e}".partition("e")
        mantissa = mantissa.rstrip("0")
        plain = f"{mantissa}{'0' if mantissa.endswith('.') else ''}e{exponent}"
        return f"YAML reads {given!r} as text: write {plain if kind == 'float_type' else int(number)} (with a point and a signed exponent, no quotes)"
    if kind == "missing":
        return "this key is missing"
    if kind == "string_pattern_mismatch":
        return f"the label {given!r} may hold only lower-case letters, digits, '.' and '-', and begins with a letter or digit"
    if isinstance(given, bool) and "type" in kind:
        return f"YAML reads this as {given}: put the word in quotes, or write the value that is wanted ({error['msg'].lower()})"
    message = error["msg"].removeprefix("Value error, ")
    return f"{message[0].lower()}{message[1:]} (given: {given!r})" if not isinstance(given, dict) else message


def _fields_at(model: Any, where: KeyPath) -> list[str]:
    """Names of the keys that are valid at `where` below `model`."""
    current: set[Any] = {model}
    for part in where:
        following: set[Any] = set()
        for candidate in current:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                field = candidate.model_fields.get(str(part))
                following |= _leaves(field.annotation, into_containers=False) if field else set()
            else:
                following |= _leaves(candidate, into_containers=True)
        current = following
    found: list[str] = []
    for candidate in current:
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            found += candidate.model_fields
    return found


def _leaves(annotation: Any, *, into_containers: bool) -> set[Any]:
    origin = typing.get_origin(annotation)
    if origin is None:
        return {annotation}
    arguments = typing.get_args(annotation)
    if origin in (dict, list, tuple):
        return _leaves(arguments[-1], into_containers=False) if into_containers else {annotation}
    if origin is typing.Annotated:
        return _leaves(arguments[0], into_containers=into_containers)
    return {leaf for a in arguments for leaf in _leaves(a, into_containers=into_containers)}


def deep_merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, key by key, at every depth; lists are replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = deep_merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def load_study(path: Path) -> spec.Study:
    """Read and check a study: its own keys, every method's options, every merged recipe, every input path.

    Raises:
        ConfigError: the first thing that is wrong.
    """
    source = read_yaml(path)
    study: spec.Study = validate(spec.Study, source.value, source)
    if study.study in RESERVED:
        raise source.error(("study",), f"{study.study!r} is a folder of its own under results/: choose another label")
    for label, entry in study.methods.items():
        method, _ = method_of(study, label, source)
        if method.TRAINS and entry.lr is None and study.search is None:
            raise source.error(("methods", label), "give it an lr, or the study a search")
        for task in study.tasks:
            recipe_of(study, task, label, source)
    _check_paths(study, source)
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


def recipe_of(study: spec.Study, task: str, label: str, source: Source | None = None) -> Recipe:
    """The study's recipe under the task's changes under the method entry's changes."""
    source = source or Source(Path("study"), {}, {})
    merged = study.recipe.model_dump(mode="json")
    recipe = study.recipe
    for key, change in (
        (("tasks", task, "recipe"), study.tasks[task].recipe),
        (("methods", label, "recipe"), study.methods[label].recipe),
    ):
        merged = deep_merge(merged, change)
        recipe = validate(Recipe, merged, source, key)
    if recipe.batch_size % recipe.micro_batch_size:
        raise source.error(
            ("recipe", "micro_batch_size"),
            f"must divide batch_size: {recipe.batch_size} is no multiple of {recipe.micro_batch_size}",
        )
    if recipe.warmup_steps >= recipe.steps:
        raise source.error(("recipe", "warmup_steps"), f"must be below steps ({recipe.steps})")
    return recipe


def _check_paths(study: spec.Study, source: Source) -> None:
    wanted: list[tuple[KeyPath, str]] = []
    for label, model in study.models.items():
        if isinstance(model, spec.LocalModel):
            wanted.append((("models", label, "path"), model.path))
    for label, task in study.tasks.items():
        if isinstance(task.train, spec.FileRows):
            wanted += [(("tasks", label, "train", "paths", i), p) for i, p in enumerate(task.train.paths)]
        for suite, test in task.suites.items():
            if isinstance(test, spec.FileSuite):
                wanted.append((("tasks", label, "suites", suite, "path"), test.path))
    for key, text in wanted:
        try:
            path = resolve(text)
        except ValueError as error:
            what = "; ".join(f"{name}: {text}" for name, text in study.inputs.items())
            raise source.error(key, f"{error}{f' ({what})' if what else ''}") from None
        if not path.exists():
            raise source.error(key, f"there is no {path}; check the variable in {text}")


def dagger(study: spec.Study, label: str) -> Sequence[str]:
    """Recipe keys that a method's entry changes: marked in every table."""
    return sorted(study.methods[label].recipe)
