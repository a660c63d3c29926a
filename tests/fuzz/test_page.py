"""Whatever stands in a text of a study, a record or a published number stays text on the page and in the tables."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import reporting_data
from harness.records.columns import FRAMES
from harness.reporting.frames import Frames, write_frames
from harness.reporting.page import write_page
from harness.reporting.table import Table
from harness.reporting.tables import write_tables
from harness.study.spec import Study
from pandas import DataFrame

HOSTILE = '[<script>alert(1)</script>" onload="x\' ]]> --> </td></table> a|b\nc\n\n$&%#_{}~^\\ <img src=x onerror=y>'
HARMLESS = "x" * len(HOSTILE)
TEXTS = {
    "runs": ("status_why", "failed_checks", "notes", "git_commit", "platform", "device", "device_why", "nvml_why",
             "throughput_why", "energy_why"),
    "documents": ("prediction", "gold"),
    "scores": ("protocol",),
}  # fmt: skip


def frames(text: str) -> Frames:
    """The frames, with the text added to every text that is no key."""
    made = reporting_data.frames()
    for name, columns in TEXTS.items():
        table: DataFrame = getattr(made, name).copy()
        for column in columns:
            assert FRAMES[name][column] == "string"
            table[column] = (table[column].fillna("") + text).astype("string")
        made = replace(made, **{name: table})
    return made


def study(text: str, published: Path) -> Study:
    made = reporting_data.study()
    methods = {label: entry.model_copy(update={"note": text}) for label, entry in made.methods.items()}
    body = made.model_dump(mode="json") | {
        "title": text, "notes": [text], "published": str(published),
        "comparisons": {"both": {"title": text, "methods": ["grass", "lora"], "reading": text}},
        "question": {"ask": text, "method": "grass", "controls": {"lora": text}},
    }  # fmt: skip
    body["methods"] = {label: entry.model_dump(mode="json") for label, entry in methods.items()}
    return Study.model_validate_json(json.dumps(body))


def published(text: str, folder: Path) -> Path:
    number = {
        "table": text, "model": "tiny", "task": "arithmetic", "suites": ["two-step"], "method": "grass",
        "metric": "accuracy", "unit": "percent", "value": 1.0, "source": "A", "status": "FOUND", "tolerance": 1.0,
        "tolerance_why": "t", "note": text,
    }  # fmt: skip
    path = folder / "published.yaml"
    path.write_text(json.dumps({"title": text, "sources": {"A": text}, "tolerances": {"t": text}, "numbers": [number]}))
    return path


class Elements(HTMLParser):
    """Every element in order, with the names of its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, ...]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        # a cell's class depends on the length of what it shows
        self.found.append((tag, *(name for name, _ in attrs if name != "class")))

    def handle_endtag(self, tag: str) -> None:
        self.found.append((f"/{tag}",))

    def handle_comment(self, data: str) -> None:
        self.found.append(("!--",))

    def unknown_decl(self, data: str) -> None:
        self.found.append(("![",))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tables and the page of hostile texts, and of harmless ones of the same length."""
    made = {}
    for text in (HOSTILE, HARMLESS):
        folder = made[text] = tmp_path_factory.mktemp("page")
        asked, rows = study(text, published(text, folder)), frames(text)
        write_frames(rows, folder)
        write_tables(rows, asked, folder / "tables")
        (folder / "figures").mkdir()
        names = [f"{kind}--tiny--both" for kind in ("results", "loss", "learning-rates")]
        for name in names:
            (folder / "figures" / f"{name}.svg").write_text("<svg/>")
        (folder / "figures.json").write_text(json.dumps({name: {"caption": text, "alt": text} for name in names}))
        write_page(rows, asked, folder, folder / "report.html")
    return made


def test_the_page_has_no_element_and_no_attribute_that_its_texts_brought(folders: dict[str, Path]) -> None:
    found = {text: Elements((folder / "report.html").read_text()).found for text, folder in folders.items()}
    assert found[HOSTILE] == found[HARMLESS]
    assert len(found[HOSTILE]) > 1000
    shown = (folders[HARMLESS] / "report.html").read_text().count(HARMLESS)
    assert shown > 50, "the texts are not on the page"


def test_a_row_of_a_table_stays_one_row(folders: dict[str, Path]) -> None:
    files = {text: sorted((folder / "tables").glob("*.md")) for text, folder in folders.items()}
    assert [f.name for f in files[HOSTILE]] == [f.name for f in files[HARMLESS]]
    for hostile, harmless in zip(files[HOSTILE], files[HARMLESS], strict=True):
        cells = [
            [len(re.findall(r"(?<!\\)\|", line)) for line in file.read_text().splitlines()]
            for file in (hostile, harmless)
        ]
        assert cells[0] == cells[1], hostile.name
        assert re.search(r"(?<!\\)<(?!/?sup>)[a-zA-Z/!]", hostile.read_text()) is None, hostile.name


def test_specials_of_tex_are_escaped_wherever_a_text_stands(folders: dict[str, Path]) -> None:
    files = {text: sorted((folder / "tables").glob("*.tex")) for text, folder in folders.items()}
    for hostile, harmless in zip(files[HOSTILE], files[HARMLESS], strict=True):
        texts = [file.read_text() for file in (hostile, harmless)]
        commands = [re.sub(r"\\[&%$#_{}]", "", text) for text in texts]
        for special in "&#_%":
            assert commands[0].count(special) == commands[1].count(special), (hostile.name, special)
        for text, command in zip(texts, commands, strict=True):
            assert command.count("{") == command.count("}"), hostile.name
            assert "\\\\\n[" not in text
            assert "\n\n" not in text.partition("\\caption")[2].partition("\\label")[0], hostile.name
        assert texts[0].count("\n") == texts[1].count("\n"), hostile.name


def test_a_head_of_a_column_is_escaped_as_its_cells_are() -> None:
    table = Table(name="t", caption="a\nb|c", raw=DataFrame(), display=DataFrame({"x|y <b>": ["[1]"]}))
    assert table.markdown().startswith("**a b\\|c**\n")
    assert "x\\|y \\<b>" in table.markdown()
    assert "\\\\\n[" not in table.latex()
