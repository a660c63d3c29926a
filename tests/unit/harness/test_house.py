"""The house is as docs/design.md draws it: what it names exists, and imports go the way of its arrows.

Every import counts, those within functions and for type checking too: an import that hides is a dependency all the
same.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import pytest
from house import ROOT

PAGE = ROOT / "docs" / "design.md"
HARNESS = ROOT / "workflow" / "harness"
PACKAGES = {"grass": ROOT / "grass", "baselines": ROOT / "baselines", "harness": HARNESS}
LIGHT = ("step", "measuring", "records", "efficiency")
"""Rooms that a bare GPU machine imports."""
HEAVY = {"pandas", "matplotlib", "lm_eval", "snakemake"}

Graph = Mapping[str, Iterable[str]]


def text() -> str:
    return PAGE.read_text(encoding="utf-8")


# ------------------------------------------------------------ what the page says


def arrows(drawing: str) -> dict[str, set[str]]:
    """Of each room, those that an arrow from it points to; `a & b --> c & d` is four arrows."""
    drawn: dict[str, set[str]] = {}
    for line in drawing.splitlines():
        if "-->" in line:
            left, right = ([name.strip() for name in side.split("&")] for side in line.split("-->"))
            for room in left:
                drawn.setdefault(room, set()).update(right)
    return drawn


def drawn() -> dict[str, set[str]]:
    found = re.search(r"```mermaid\n(.*?)```", text(), re.DOTALL)
    assert found is not None, "the page has no drawing"
    return arrows(found.group(1))


def reached(graph: Graph, start: str) -> set[str]:
    """All that can be reached from `start`, itself only by a circle."""
    found: set[str] = set()
    left = list(graph.get(start, ()))
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += graph.get(name, ())
    return found


def rooms_table() -> dict[str, list[str]]:
    """Room and what it is said to hold, as the page's first table has them."""
    table = text().partition("| room of `workflow/harness/` |")[2].partition("\n\n")[0]
    rows = [line.strip("|").split(" | ") for line in table.splitlines()[2:]]
    return {row[0].strip(" `/"): re.findall(r"`(\w+)`", row[-1]) for row in rows}


# ------------------------------------------------------------ what the code does


@cache
def modules() -> dict[str, Path]:
    """Every module of the three packages by its dotted name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(source: str, known: Iterable[str]) -> set[str]:
    """Modules that a source imports anywhere; `from a import b` is a.b where that is one of the `known` modules."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports in this house are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = names & set(known)
            found |= inside
            if inside != names:
                found.add(str(node.module))
    return found


@cache
def imports() -> dict[str, set[str]]:
    """What each module imports, foreign packages too."""
    return {name: imported(path.read_text(encoding="utf-8"), modules()) for name, path in modules().items()}


def own_imports() -> dict[str, set[str]]:
    return {name: {other for other in found if other in modules()} for name, found in imports().items()}


def room_of(module: str) -> str | None:
    """Room that a module lies in; None for single files of the harness, which every room may use."""
    package, *inside = module.split(".")
    if package != "harness":
        return package
    return inside[0] if inside and (HARNESS / inside[0]).is_dir() else None


def circle(graph: Graph) -> list[str] | None:
    """Some circle of a graph, its first member at its end once more; None where there is none."""
    done: set[str] = set()

    def search(name: str, path: list[str]) -> list[str] | None:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in sorted(graph.get(name, ())):
                if found := search(other, [*path, name]):
                    return found
            done.add(name)
        return None

    return next((found for name in sorted(graph) if (found := search(name, []))), None)


# ------------------------------------------------------------ they agree


def test_every_path_that_the_page_names_exists() -> None:
    """Names with a slash in backticks, rooms apart; those under `results/` come with runs."""
    named = set(re.findall(r"`([\w./-]*/[\w./-]*)`", text())) - {f"{room}/" for room in rooms_table()}
    missing = {n for n in named if not n.startswith("results/") and not (ROOT / n).exists()}
    links = {n for n in re.findall(r"\]\(([^)#:]+)\)", text()) if not (PAGE.parent / n).exists()}
    assert not missing | links


def test_the_table_names_every_room_and_files_that_are_there() -> None:
    table = rooms_table()
    rooms = {path.parent.name for path in HARNESS.glob("*/__init__.py")}
    assert set(table) == rooms
    missing = {
        f"{room}/{name}"
        for room, names in table.items()
        for name in names
        if not (HARNESS / room / f"{name}.py").is_file() and not (HARNESS / room / name).is_dir()
    }
    assert not missing


def test_every_room_is_drawn() -> None:
    everything = set(drawn()) | set().union(*drawn().values())
    assert everything == {*rooms_table(), "rules", "grass", "baselines"}


def test_no_import_goes_against_an_arrow() -> None:
    below = {room: reached(drawn(), room) for room in drawn()}
    against = sorted(
        f"{name} imports {other}"
        for name, others in own_imports().items()
        for other in others
        if (here := room_of(name)) != (there := room_of(other))
        and here is not None
        and there is not None
        and there not in below.get(here, ())
    )
    assert not against, "\n".join(against)


def test_rules_import_no_more_than_it_takes_to_plan() -> None:
    files = [ROOT / "Snakefile", *(ROOT / "workflow" / "rules").glob("*.smk")]
    found = {m for f in files for m in re.findall(r"^\s*(?:from|import) (harness[\w.]*)", f.read_text("utf-8"), re.M)}
    assert found
    assert {room_of(module) for module in found} <= {"study", None}


def test_single_files_of_the_harness_use_no_room() -> None:
    """Else a room that uses them would use that room; `__main__`, the door, is used by nobody."""
    single = [name for name in modules() if room_of(name) is None and name != "harness.__main__"]
    assert not {f"{name} imports {other}" for name in single for other in own_imports()[name] if room_of(other)}


def test_the_audit_needs_measuring_alone() -> None:
    rooms = {room_of(other) for name, others in own_imports().items() if room_of(name) == "audit" for other in others}
    assert rooms <= {"audit", "measuring", "grass", None}


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circle(own_imports()) is None


def test_no_rooms_import_each_other_in_a_circle() -> None:
    rooms: dict[str, set[str]] = {}
    for name, others in own_imports().items():
        here = room_of(name)
        if here is not None:
            rooms.setdefault(here, set()).update(r for o in others if (r := room_of(o)) not in (None, here))  # type: ignore[misc]
    assert circle(rooms) is None


@pytest.mark.parametrize("room", LIGHT)
def test_what_measures_needs_no_tables_figures_or_workflow(room: str) -> None:
    heavy = {
        f"{name} imports {other}"
        for name, others in imports().items()
        if room_of(name) == room
        for other in others
        if other.partition(".")[0] in HEAVY
    }
    assert not heavy


def test_planning_imports_no_torch() -> None:
    found = {
        name for name, others in imports().items() if room_of(name) == "study" and others & {"torch", "transformers"}
    }
    assert not found


# ------------------------------------------------------------ and the test can see


def test_imports_are_seen_wherever_they_stand() -> None:
    source = "\n".join(
        [
            "import a.b as c",
            "from typing import TYPE_CHECKING",
            "if TYPE_CHECKING:\n    from x.y import Z",
            "def f():\n    from x import y, w\n    import lazily",
        ]
    )
    assert imported(source, ["x.y"]) == {"a.b", "typing", "x.y", "x", "lazily"}


def test_arrows_are_read_one_by_one_and_followed() -> None:
    graph = arrows("graph TD\n  a & b --> c & d\n  d --> e")
    assert graph == {"a": {"c", "d"}, "b": {"c", "d"}, "d": {"e"}}
    assert reached(graph, "a") == {"c", "d", "e"}


def test_a_circle_is_found_through_others() -> None:
    assert circle({"a": ["b"], "b": ["c"], "c": ["a", "d"]}) == ["a", "b", "c", "a"]
    assert circle({"a": ["b", "c"], "b": ["c"], "c": []}) is None
