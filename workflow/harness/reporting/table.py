"""One table: raw numbers for csv, display strings for people, a caption, footnotes; and its four renderings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pandas import DataFrame

from harness.records.atomic import write_text
from harness.records.units import GIB, gib
from harness.reporting.page_parts import MARK, PageTable

UNKNOWN = "—"
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "†": r"\dag{}", "—": "---", "–": "--",
    "×": r"$\times$", "≥": r"$\geq$", "≤": r"$\leq$", "−": "$-$", "·": r"$\cdot$", "<": r"\textless{}",
    ">": r"\textgreater{}",
}  # fmt: skip


@dataclass
class Footnotes:
    """Footnotes of one table; the same text keeps the same letter."""

    marked: dict[str, str] = field(default_factory=dict)
    general: list[str] = field(default_factory=list)

    def mark(self, text: str) -> str:
        """The marker of a footnote, to be put behind a cell's text."""
        number = len(self.marked)
        letter = chr(ord("a") + number % 26) * (number // 26 + 1)
        return f"^{self.marked.setdefault(text, letter)}^"

    def add(self, text: str) -> None:
        """A footnote about the whole table."""
        if text not in self.general:
            self.general.append(text)

    def lines(self) -> tuple[str, ...]:
        """All footnotes, marked ones first."""
        return (*(f"^{letter}^ {text}" for text, letter in self.marked.items()), *self.general)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A finished table. In display strings `^a^` marks footnote a."""

    name: str
    caption: str
    raw: DataFrame
    """Full precision, units in the column names, null where unknown."""
    display: DataFrame
    """Strings only."""
    footnotes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """GitHub markdown."""
        escaped = self.display.map(_markdown).rename(columns=_markdown)
        body = escaped.to_markdown(index=False, disable_numparse=True)
        notes = "".join(f"\n- {_markdown(note)}" for note in self.footnotes)
        return f"**{_markdown(self.caption)}**\n\n{body}\n" + (f"{notes}\n" if notes else "")

    def latex(self) -> str:
        """A table float; needs the package booktabs, and graphicx to shrink a wide one."""
        notes = "".join(f"\\par {_latex(note)}\n" for note in self.footnotes)
        return (
            f"\\begin{{table}}\n\\centering\n\\caption{{{_latex(self.caption)}}}\n\\label{{tab:{self.name}}}\n"
            f"{self._tabular()}\\par\\raggedright\\footnotesize\n{notes}\\end{{table}}\n"
        )

    def _tabular(self) -> str:
        if self.display.empty:
            return ""
        escaped = self.display.map(_latex)
        escaped.columns = [_latex(str(column)) for column in self.display.columns]
        body = escaped.style.hide(axis="index").to_latex(hrules=True, column_format="l" * len(escaped.columns))
        return f"\\resizebox{{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}}{{!}}{{%\n{body}}}\n"

    def page(self) -> PageTable:
        """What the html page needs."""
        return PageTable(
            caption=self.caption,
            columns=[str(column) for column in self.display.columns],
            rows=[list(row) for row in self.display.itertuples(index=False, name=None)],
            footnotes=list(self.footnotes),
        )

    def write(self, folder: Path) -> None:
        """Write `<name>.csv`, `.md` and `.tex`."""
        write_text(folder / f"{self.name}.csv", self.raw.to_csv(index=False, lineterminator="\n"))
        write_text(folder / f"{self.name}.md", self.markdown())
        write_text(folder / f"{self.name}.tex", self.latex())


def table_of_rows(
    name: str, caption: str, raw: Sequence[Mapping[str, Any]], display: Sequence[Mapping[str, str]], notes: Footnotes
) -> Table:
    """A table from its rows; a column's integers stay integers beside unknown ones. Without rows it has no notes."""
    return Table(
        name=name,
        caption=caption,
        raw=DataFrame(raw, dtype=object),
        display=DataFrame(display),
        footnotes=notes.lines() if raw else (),
    )


def number(value: float | None, digits: int) -> str:
    """A number for display, or a dash if it is unknown."""
    return UNKNOWN if value is None else f"{value:,.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int) -> str:
    """The same with its sign."""
    return UNKNOWN if value is None else f"{value:+.{digits}f}".replace("-", "−")


def gib_or_unknown(nbytes: float | None) -> str:
    """Bytes as GiB, or a dash; four decimals for models so small that two would show only zeros."""
    return UNKNOWN if nbytes is None else gib(nbytes, 2 if nbytes >= GIB / 10 else 4)


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage, or a dash."""
    return UNKNOWN if share is None else f"{number(100 * share, digits)} %"


def rate(value: float) -> str:
    """A learning rate: 0.0003 reads 3e-4."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _markdown(text: str) -> str:
    # a line break ends a row; a text is no element of a page
    escaped = _TAG.sub(r"\\<", " ".join(text.splitlines()).replace("|", "\\|"))
    return MARK.sub(r"<sup>\1</sup>", escaped)


def _latex(text: str) -> str:
    parts = MARK.split(" ".join(text.splitlines()))  # odd places hold the letters of footnote markers
    # behind the end of a row these would be read as arguments of it
    return ("{}" if text.startswith(("[", "*")) else "") + "".join(
        f"\\textsuperscript{{{part}}}" if i % 2 else "".join(_TEX.get(c, c) for c in part)
        for i, part in enumerate(parts)
    )
