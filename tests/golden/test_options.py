"""Options that users write, by name and default, as they were when somebody last looked at them.

A renamed or lost option breaks scripts and configs of other people, and a changed default changes what they get without
an error. Where it is wanted, write the list anew and say so in CHANGELOG.md:

    python tests/golden/test_options.py
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from harness.efficiency.spec import EfficiencyStudy
from harness.records.atomic import write_text
from harness.study.spec import Study
from pydantic import BaseModel

from baselines import find_method, method_names
from baselines.method import Recipe
from grass import Grass

FILE = Path(__file__).with_name("options.json")
AGAIN = "if this is wanted: python tests/golden/test_options.py, and a line in CHANGELOG.md"
REQUIRED = "required"
METHOD_FILE = "baselines/{}.py".format

Listing = dict[str, dict[str, Any]]


def of_grass() -> dict[str, Any]:
    """Arguments of `Grass` after the model, and their defaults."""
    arguments = list(inspect.signature(Grass).parameters.values())[1:]
    return {a.name: REQUIRED if a.default is a.empty else a.default for a in arguments}


def of_model(model: type[BaseModel]) -> Listing:
    """Keys of a configuration model and of all models within it, by the names of its JSON schema."""
    schema = model.model_json_schema()
    parts = {model.__name__: schema, **schema.get("$defs", {})}
    return {
        name: {
            key: value.get("default", REQUIRED if key in part.get("required", ()) else None)
            for key, value in part["properties"].items()
        }
        for name, part in sorted(parts.items())
        if "properties" in part
    }


def todays() -> dict[str, Listing]:
    """All of it, as JSON has it."""
    found: dict[str, Listing] = {"grass": {"Grass": of_grass()}}
    for model in (Study, EfficiencyStudy, Recipe):
        found[model.__name__] = of_model(model)
    for name in method_names():
        found[METHOD_FILE(name)] = of_model(find_method(name).Config)
    listed: dict[str, Listing] = json.loads(json.dumps(found))
    return listed


def differences(before: Listing, now: Listing) -> list[str]:
    """What changed, one line an option."""
    lines = []
    for block in sorted({*before, *now}):
        old, new = before.get(block, {}), now.get(block, {})
        for key in sorted({*old, *new}):
            if key not in new:
                lines.append(f"{block}.{key} is gone")
            elif key not in old:
                lines.append(f"{block}.{key} is new")
            elif old[key] != new[key]:
                lines.append(f"{block}.{key}: the default was {old[key]!r} and is {new[key]!r}")
    return lines


def golden() -> dict[str, Listing]:
    loaded: dict[str, Listing] = json.loads(FILE.read_text(encoding="utf-8"))
    return loaded


@pytest.mark.parametrize("place", ["grass", "Study", "EfficiencyStudy", "Recipe", *map(METHOD_FILE, method_names())])
def test_options_are_the_golden_ones(place: str) -> None:
    changed = differences(golden().get(place, {}), todays()[place])
    assert not changed, f"{place}: {'; '.join(changed)}; {AGAIN}"


def test_no_method_and_no_study_is_gone() -> None:
    assert set(golden()) == set(todays()), AGAIN


def test_every_change_of_an_option_is_told() -> None:
    before = {"A": {"kept": 1, "lost": 2, "changed": 3}, "Gone": {"x": None}}
    now = {"A": {"kept": 1, "changed": 4, "added": REQUIRED}}
    assert differences(before, now) == [
        "A.added is new",
        "A.changed: the default was 3 and is 4",
        "A.lost is gone",
        "Gone.x is gone",
    ]


def test_defaults_of_grass_are_those_of_its_options() -> None:
    """The signature is for readers; `grass.Options` is what counts."""
    from dataclasses import MISSING, fields

    from grass.options import Options

    defined = {f.name: REQUIRED if f.default is MISSING else f.default for f in fields(Options)}
    assert {key: value for key, value in of_grass().items() if key != "layers"} == defined


def regenerate() -> None:
    """Write options.json from today's code."""
    write_text(FILE, json.dumps(todays(), indent=1) + "\n")
    print(f"written to {FILE}")


if __name__ == "__main__":
    regenerate()
