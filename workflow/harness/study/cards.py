"""Which card a run needs, where a cluster has several kinds. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

from harness.errors import UserError
from harness.records.reading import read
from harness.records.run import RunForecast
from harness.records.units import parse_bytes
from harness.study.paths import resolve
from harness.study.strict_yaml import read_yaml

CARDS = "CARDS"
"""Environment variable with the file that says what cards there are."""


def cards() -> dict[str, int]:
    """Memory in bytes of every kind of card, smallest first, by the constraint that asks a scheduler for it.

    Empty where no file is named. The file has one line a kind: `a100: 80GiB`.

    Raises:
        UserError: the file is not such a table.
    """
    if not os.environ.get(CARDS):
        return {}
    source = read_yaml(resolve(f"${{{CARDS}}}"))
    found = {}
    for constraint, memory in source.value.items():
        try:
            found[constraint] = parse_bytes(str(memory))
        except UserError as error:
            raise source.error((constraint,), str(error)) from None
    return dict(sorted(found.items(), key=lambda entry: entry[1]))


def card_for(forecast: Path, known: dict[str, int]) -> str | None:
    """The constraint for the smallest card that fits a forecast, else for the largest, where the run says why not.

    None where there is nothing to choose, no forecast yet, or one without a number.
    """
    needed = read(forecast, RunForecast).needed_bytes if known and forecast.is_file() else None
    if needed is None:
        return None
    return next((constraint for constraint, memory in known.items() if needed <= memory), list(known)[-1])
