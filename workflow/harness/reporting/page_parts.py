"""What a page is put together from, as `tables.json` and `figures.json` keep it: plain text, escaped when it is shown.

Published frames may come from a stranger: nothing in these files reaches a page as markup.
"""

from __future__ import annotations

import html
import re
from typing import Any

from markupsafe import Markup
from pydantic import BaseModel, RootModel

MARK = re.compile(r"\^([a-z]+)\^")
"""A footnote marker in a text."""


class PageTable(BaseModel, extra="forbid", frozen=True):
    """Display strings of a table, in which `^a^` marks footnote a."""

    caption: str
    columns: list[str]
    rows: list[list[str]]
    footnotes: list[str]

    def rendered(self) -> dict[str, Any]:
        """Escaped for the html page, with footnote markers raised."""
        return {
            "caption": _html(self.caption),
            "columns": [_html(column) for column in self.columns],
            "rows": [[_html(cell) for cell in row] for row in self.rows],
            "footnotes": [_html(note) for note in self.footnotes],
        }


class PageTables(RootModel[dict[str, PageTable]]):
    """`tables.json`: tables by name."""


class FigureTexts(BaseModel, extra="forbid", frozen=True):
    """What stands below a figure, and in its place where it is not seen."""

    caption: str
    alt: str


class Figures(RootModel[dict[str, FigureTexts]]):
    """`figures.json`: texts by the figure's name."""


def _html(text: str) -> Markup:
    return Markup(MARK.sub(r"<sup>\1</sup>", html.escape(text)))
