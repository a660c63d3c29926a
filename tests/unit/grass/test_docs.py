"""docs/grass.md is true: its examples run in order, its table of options is the one in the code."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from house import ROOT

from grass import Options
from grass.sampling import NEEDS_PROBE

PAGE = ROOT / "docs" / "grass.md"
TEXT = PAGE.read_text(encoding="utf-8")


def rows_of_the_table_that_begins(header: str) -> list[list[str]]:
    lines = TEXT[TEXT.index(header) :].splitlines()[2:]
    table = lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


@pytest.mark.filterwarnings("ignore")
def test_the_examples_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    examples = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(examples) == 4
    for number, example in enumerate(examples):
        exec(compile(example, f"docs/grass.md, example {number}", "exec"), names)
    assert {"history.jsonl", "history.png", "checkpoint.pt"} <= {path.name for path in tmp_path.iterdir()}


def test_the_table_of_options_is_complete_and_gives_the_real_defaults() -> None:
    rows = rows_of_the_table_that_begins("| option | symbol |")
    documented = {row[0].strip("`"): row[2].strip("`") for row in rows}
    fields = {field.name: field.default for field in dataclasses.fields(Options)}
    assert set(documented) == set(fields)
    for name, default in fields.items():
        wanted = "" if default is dataclasses.MISSING else f'"{default}"' if isinstance(default, str) else repr(default)
        assert documented[name] == wanted, name


def test_the_table_of_samplers_says_which_need_a_probe() -> None:
    rows = rows_of_the_table_that_begins("| `sampler` | draws by |")
    assert {row[0].strip("`") for row in rows if row[2] == "yes"} == NEEDS_PROBE
    from typing import get_args

    from grass.sampling import Sampler

    assert [row[0].strip("`") for row in rows] == sorted(get_args(Sampler), key=[r[0].strip("`") for r in rows].index)
    assert len(rows) == len(get_args(Sampler))


def test_every_picture_and_anchor_of_the_page_is_there() -> None:
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXT):
        assert (PAGE.parent / picture).is_file(), picture
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line[3:].lower()).replace(" ", "-")
        for line in TEXT.splitlines()
        if line.startswith("## ")
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= headings
