"""The box at the head of a report: what was found, how sure it is, and what could not be told, in at most ten lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from pandas import DataFrame

from harness.reporting.frames import Frames
from harness.reporting.layout import SUBJECT
from harness.reporting.score_tables import Measure
from harness.reporting.table import number

MOST_LINES = 10
_NAMED = 4
"""Rivals that a line names before it counts the others."""


def in_short(frames: Frames, compared: Mapping[Measure, Path], *, answered: str | None) -> list[str]:
    """The lines of the box.

    Args:
        frames: the study's tables.
        compared: csv of the paired differences, by measure.
        answered: the answer to the study's own question; None if it asks none.
    """
    lines = [] if answered is None else [answered]
    open_ones: Counter[str] = Counter()
    for measure, file in compared.items():
        if file.stat().st_size <= 1:  # nothing to compare: a csv without columns
            continue
        rows = pd.read_csv(file)
        if answered is None:
            lines.append(_of_measure(rows, measure))
        open_ones.update(map(_reason, rows.loc[~rows["verdict"].isin(["higher", "lower"]), "verdict"]))
    if open_ones:
        reasons = "; ".join(f"{reason} ({n})" for reason, n in open_ones.most_common(3))
        lines.append(f"What could not be told, by number of comparisons: {reasons}.")
    ok = frames.ok_runs()
    if stale := int(ok["stale"].fillna(False).sum()):
        lines.append(f"{stale} of the {len(ok)} runs that count were made by code that has changed since.")
    if lost := len(frames.runs) - len(ok):
        lines.append(f"{lost} of {len(frames.runs)} runs do not count: see the outcomes.")
    return lines[:MOST_LINES]


def _of_measure(rows: DataFrame, measure: Measure) -> str:
    found = []
    words = rows.apply(_word, axis="columns", measure=measure)
    for word in ("better", "worse", "no claim"):
        if (words == word).any():
            mine = rows[words == word]
            found.append(f"{word} {_named(mine['rival'])}" + ("" if word == "no claim" else _sizes(mine, measure)))
    return f"{measure.title.partition(' (')[0]}, {len(rows)} comparisons of {SUBJECT}: {'; '.join(found)}."


def _sizes(rows: DataFrame, measure: Measure) -> str:
    sizes = sorted(measure.scale * abs(float(d)) for d in rows[f"difference_{measure.raw_unit}"])
    ends = dict.fromkeys(number(size, measure.digits) for size in (sizes[0], sizes[-1]))
    return f", by {' to '.join(ends)} {'points' if measure.is_share else measure.unit}"


def _word(row: Mapping[Any, Any], measure: Measure) -> str:
    if row["verdict"] not in {"higher", "lower"}:
        return "no claim"
    return "better" if (row["verdict"] == "higher") == measure.is_share else "worse"


def _named(rivals: Iterable[str]) -> str:
    counted = Counter(rivals)
    named = [f"{rival}, {n} times" if n > 1 else rival for rival, n in counted.most_common(_NAMED)]
    more = len(counted) - len(named)
    return f"in {sum(counted.values())} ({'; '.join(named)}{f'; {more} rivals more' if more > 0 else ''})"


def _reason(verdict: str) -> str:
    return verdict.removeprefix("no claim (").removesuffix(")").partition(" (p = ")[0]
