"""Reads YAML files strictly.

Every error is one line that names the file, the line, the key and the remedy. YAML 1.1 reads `1e-5` as text and `no` as
false: such values are refused where a number or a word is expected, never guessed.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from harness.errors import UserError, first_line

KeyPath = tuple[str | int, ...]
_YAML = "tag:yaml.org,2002:"

MOST_BYTES = 400_000
MOST_VALUES = 20_000
"""Keys and values of a file; what an alias stands for counts wherever it stands."""
DEEPEST = 40
"""Lists and mappings within one another."""
_LARGEST = 2**63


class ConfigError(UserError):
    """One line for the user: file, line, key, what is wrong and how to fix it."""


@dataclass(frozen=True)
class Source:
    """A parsed YAML file and the line of each of its keys."""

    path: Path
    value: dict[str, Any]
    lines: dict[KeyPath, int]
    words: dict[KeyPath, str] = field(default_factory=dict)
    """The literal text of every value that YAML reads as true or false."""

    def error(self, key: KeyPath, message: str) -> ConfigError:
        """An error about `key`, with the line of the nearest enclosing key that is in the file."""
        known = key
        while known and known not in self.lines:
            known = known[:-1]
        dotted = ".".join(map(str, key)) + ": " if key else ""
        return ConfigError(f"{self.path}:{self.lines.get(known, 1)}: {dotted}{message}".replace("\n", "\\n"))


def read_yaml(path: Path) -> Source:
    """Parse one YAML mapping; duplicate keys, tags and keys that are not text are refused.

    Raises:
        ConfigError: also for a missing or an empty file.
    """
    if not path.is_file():
        near = sorted({*path.parent.glob("[!.]*.yaml"), *Path("config").glob("*.yaml")})
        raise ConfigError(f"{path}: no such file" + (f"; there are {', '.join(map(str, near))}" if near else ""))
    source = Source(path, {}, {})
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{path}:1: larger than {MOST_BYTES // 1000} kB: a file written by hand is wanted here")
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        _check_extent(node, path)
        value = _build(node, (), source, ()) if node is not None else None
    except yaml.MarkedYAMLError as error:
        mark, began = error.problem_mark or error.context_mark, error.context_mark
        since = f" ({error.context}, begun on line {began.line + 1})" if began and error.context else ""
        mend = next((f"; {mend}" for sign, mend in _SYNTAX.items() if sign in str(error.problem)), "")
        raise ConfigError(f"{path}:{mark.line + 1 if mark else 1}: not YAML: {error.problem}{since}{mend}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}:1: not UTF-8 text ({first_line(error)}): save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}:1: not YAML: {first_line(error)}") from None
    except RecursionError:
        raise ConfigError(f"{path}:1: {_TOO_DEEP}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a file that you may read") from None
    if node is None:
        raise ConfigError(f"{path}:1: the file is empty; copy config/embedded.yaml and edit it")
    if not isinstance(value, dict):
        raise ConfigError(f"{path}:1: `key: value` lines are wanted, this file holds a list or a single value")
    return Source(path, value, source.lines, source.words)


_SYNTAX = {
    "'\\t'": "indent with spaces, not tabs",
    "mapping values": "put text with ': ' in it in quotes, and look at the indentation",
}
_PLAIN = {_YAML + kind for kind in ("null", "bool", "int", "float", "str")}


_TOO_DEEP = f"more than {DEEPEST} lists and mappings within one another: look at the brackets and the indentation"


def _check_extent(node: yaml.Node | None, path: Path) -> None:
    """Refuse a file that is small on disk and huge once its aliases are written out."""
    known: dict[int, tuple[int, int]] = {}

    def extent(node: yaml.Node) -> tuple[int, int]:
        if id(node) not in known:
            known[id(node)] = (1, 1)  # met again below itself, it is refused later, by its key
            inside = node.value if isinstance(node, yaml.CollectionNode) else []
            children = [child for item in inside for child in (item if isinstance(item, tuple) else (item,))]
            found = [extent(child) for child in children]
            known[id(node)] = (1 + sum(n for n, _ in found), 1 + max((deep for _, deep in found), default=0))
        return known[id(node)]

    values, deep = extent(node) if node is not None else (0, 0)
    if values > MOST_VALUES:
        many = f"more than {MOST_VALUES:,} keys and values, aliases written out: leave some out"
        raise ConfigError(f"{path}:1: {many}")
    if deep > DEEPEST:
        raise ConfigError(f"{path}:1: {_TOO_DEEP}")


def _build(node: yaml.Node, key: KeyPath, source: Source, outer: tuple[yaml.Node, ...]) -> Any:
    source.lines.setdefault(key, node.start_mark.line + 1)
    if node in outer:
        raise source.error(key, "this value holds itself: write it out")
    if isinstance(node, yaml.MappingNode) and node.tag == _YAML + "map":
        return _build_mapping(node, key, source, (*outer, node))
    if isinstance(node, yaml.SequenceNode) and node.tag == _YAML + "seq":
        return [_build(child, (*key, i), source, (*outer, node)) for i, child in enumerate(node.value)]
    if node.tag == _YAML + "timestamp":
        raise source.error(key, f"YAML reads {node.value} as a date: put it in quotes")
    if not isinstance(node, yaml.ScalarNode) or node.tag not in _PLAIN:
        raise source.error(key, f"the YAML tag {node.tag.replace(_YAML, '!!')!r} is not used here: write a plain value")
    try:
        value = yaml.SafeLoader("").construct_object(node)
    except ValueError:
        raise source.error(key, f"YAML cannot read {node.value!r} as {node.tag.replace(_YAML, '')}") from None
    if isinstance(value, int) and abs(value) >= _LARGEST:
        raise source.error(key, f"a number below {_LARGEST:.1e} is wanted, not {node.value}")
    if isinstance(value, float) and not math.isfinite(value):
        raise source.error(key, f"a finite number is wanted, not {node.value}")
    if isinstance(value, bool):
        source.words[key] = f"YAML reads the bare word {node.value} as {json.dumps(value)}"
    return value


def _read_as(node: yaml.ScalarNode) -> str:
    try:
        return json.dumps(yaml.SafeLoader("").construct_object(node))
    except ValueError:  # 0x_, or thousands of digits
        return node.tag.replace(_YAML, "")


def _build_mapping(node: yaml.MappingNode, key: KeyPath, source: Source, outer: tuple[yaml.Node, ...]) -> Any:
    names: dict[str, int] = {}
    for key_node, _ in node.value:
        at, name = f"{source.path}:{key_node.start_mark.line + 1}", key_node.value
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in {*_PLAIN, _YAML + "merge"}:
            raise ConfigError(f"{at}: a key is one plain word: no tag, no list, no mapping")
        if key_node.tag in _PLAIN - {_YAML + "str"}:
            raise ConfigError(f"{at}: YAML reads the key {name!r} as {_read_as(key_node)}: put it in quotes")
        if name in names:
            raise ConfigError(f"{at}: the key {name!r} stands twice in this mapping, first on line {names[name]}")
        names[name] = key_node.start_mark.line + 1
    yaml.SafeLoader("").flatten_mapping(node)  # `<<: *anchor`
    node.value = list({k.value: (k, v) for k, v in node.value}.values())
    source.lines.update({(*key, k.value): k.start_mark.line + 1 for k, _ in node.value})
    return {k.value: _build(v, (*key, k.value), source, outer) for k, v in node.value}


def validate(model: type[BaseModel], value: Any, source: Source, at: KeyPath = ()) -> Any:
    """Strictly validate plain data that stands at `at` in `source`; the first error becomes a `ConfigError`."""
    try:
        return model.model_validate_json(json.dumps(value))
    except ValidationError as error:
        # a misspelt key is also reported as a missing key: the misspelling is the one to show
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        where, candidates = _locate(model, first["loc"])
        key = (*at, *where, *(["kind"] if first["type"].startswith("union_tag") else []))
        message = _mend(first, model, candidates)
        if first["type"] == "value_error":
            # messages of our own validators begin with the key they are about, relative to their model
            head, colon, rest = message.partition(": ")
            below = [k for k in source.lines if k[: len(key)] == key and ".".join(map(str, k[len(key) :])) == head]
            key, message = (below[0], rest) if colon and below else (key, message)
        raise source.error(key, message + (f" ({source.words[key]})" if key in source.words else "")) from None


def _locate(model: type[BaseModel], location: Sequence[str | int]) -> tuple[KeyPath, set[Any]]:
    """The key path of pydantic's `location`, and the types that are valid there.

    A location also holds the `kind` of a tagged union, right after the union's key, and "[key]" after a wrong label;
    neither is a key.
    """
    found: list[str | int] = []
    current: set[Any] = {model}
    for part in location:
        models = [c for c in current if isinstance(c, type) and issubclass(c, BaseModel)]
        if len(models) > 1:
            current = {m for m in models if part in typing.get_args(m.model_fields["kind"].annotation)}
        elif part != "[key]":
            found.append(part)
            field_of = models[0].model_fields.get(str(part)) if models else None
            if field_of is not None:
                current = _leaves(field_of.annotation, into_containers=False)
            else:
                current = {leaf for c in current for leaf in _leaves(c, into_containers=True)}
    return tuple(found), current


def _leaves(annotation: Any, *, into_containers: bool) -> set[Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is None:
        return {annotation}
    if origin in (dict, list, tuple):
        return _leaves(arguments[origin is dict], into_containers=False) if into_containers else {annotation}
    if origin is typing.Annotated:
        return _leaves(arguments[0], into_containers=into_containers)
    return {leaf for a in arguments for leaf in _leaves(a, into_containers=into_containers)}


_WORDING = {
    "greater_than": "must be above {gt}, not {given}",
    "greater_than_equal": "must be at least {ge}, not {given}",
    "less_than": "must be below {lt}, not {given}",
    "less_than_equal": "must be at most {le}, not {given}",
    "literal_error": "must be {expected}, not {given}",
    "int_type": "a whole number is wanted, not {given}",
    "float_type": "a number is wanted, not {given}",
    "bool_type": "true or false is wanted, not {given}",
    "string_type": "text is wanted, not {given}: put it in quotes",
    "tuple_type": "a list is wanted, not {given}: write [{given}]",
    "dict_type": "`key: value` lines are wanted, not {given}",
    "string_too_long": "at most {max_length} letters are wanted",
    "string_too_short": "at least {min_length} letter is wanted",
    "too_short": "at least {min_length} wanted, given {actual_length}",
    "too_long": "at most {max_length} wanted, given {actual_length}",
    "union_tag_invalid": "must be one of {expected_tags}, not '{tag}'",
}


def _mend(error: Any, model: type[BaseModel], candidates: set[Any]) -> str:
    kind, given, context = error["type"], error.get("input"), error.get("ctx", {})
    shown = "an empty value" if given is None else json.dumps(given, ensure_ascii=False)
    parents = _locate(model, error["loc"][:-1])[1]
    fields = {name: f for p in parents for name, f in getattr(p, "model_fields", {}).items()}
    last = str(error["loc"][-1]) if error["loc"] else ""
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(last, fields, n=1, cutoff=0.5)
        return f"unknown key; {f'did you mean {near[0]!r}?' if near else 'valid keys: ' + ', '.join(sorted(fields))}"
    if kind == "missing":
        return f"this {'key' if last in fields else 'value'} is missing"
    if kind == "union_tag_not_found":
        kinds = sorted(k for c in candidates for k in typing.get_args(c.model_fields["kind"].annotation))
        return f"this key is missing; it is one of {', '.join(kinds)}"
    if kind in {"float_type", "int_type"} and isinstance(given, str):
        return _number(given, whole=kind == "int_type")
    if kind == "string_pattern_mismatch":
        plain = re.sub(r"[^a-z0-9.]+", "-", str(given).lower()).strip("-.")
        rule = "a label holds lower-case letters, digits, '.' and '-' only and begins with a letter or digit"
        return f"{rule}{f': write {plain}' if plain else ''}"
    if kind.startswith("model_"):
        keys = sorted({name for c in candidates for name in getattr(c, "model_fields", {})})
        return f"`key: value` lines are wanted, not {shown}; valid keys: {', '.join(keys)}"
    if kind in _WORDING:
        return _WORDING[kind].format(given=shown, **context)
    return str(error["msg"]).removeprefix("Value error, ")


def _number(text: str, *, whole: bool) -> str:
    """How to write a number that YAML took for text."""
    try:
        number = float(text)
        if not math.isfinite(number) or (whole and number != int(number)):
            raise ValueError
    except ValueError:
        return f"a {'whole ' if whole else ''}number is wanted, not the text {text!r}"
    if whole:
        return f"YAML reads {text!r} as text: write {int(number)}, without quotes"
    mantissa, _, exponent = f"{number:.12e}".partition("e")
    plain = f"{float(mantissa)}e{int(exponent):+d}"
    return f"YAML reads {text!r} as text: write {plain}, with a point and a signed exponent, without quotes"
