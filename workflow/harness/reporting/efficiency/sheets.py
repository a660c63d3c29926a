"""How the tables of an efficiency study are put together and how they show bytes and shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pandas import DataFrame

from harness.reporting.table import UNKNOWN, Footnotes, Table, number

GIB = 2**30


def sheet(
    name: str, caption: str, raw: Sequence[Mapping[str, Any]], display: Sequence[Mapping[str, str]], notes: Footnotes
) -> Table:
    """A finished table of rows, bytes integers beside unknown ones; one without rows needs no notes."""
    return Table(
        name=name,
        caption=caption,
        raw=DataFrame(raw, dtype=object),
        display=DataFrame(display),
        footnotes=notes.lines() if raw else (),
    )


def gib(value: float | None) -> str:
    """Bytes as GiB; four digits for a model so small that two would show nothing."""
    return UNKNOWN if value is None else number(value / GIB, 2 if value >= GIB / 10 else 4)


def percent(value: float | None, digits: int = 1) -> str:
    """A share as a percentage."""
    return UNKNOWN if value is None else f"{number(100 * value, digits)} %"
