"""Suites that a killed scoring had finished: what came out of each is kept until all of them are scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from harness.records.atomic import write_record
from harness.records.reading import read
from harness.records.run import LmEvalScore, SuiteScore


class Finished(BaseModel, extra="forbid", frozen=True):
    """All that came out of one suite; the rows are those of the tables beside the record."""

    settings: dict[str, Any]
    scores: list[SuiteScore]
    documents: list[dict[str, Any]]
    lm_eval: list[LmEvalScore]
    samples: list[dict[str, Any]]


def keep(folder: Path, suite: str, finished: Finished) -> None:
    """Note that a suite is scored."""
    write_record(folder / f"{suite}.json", finished)


def kept(folder: Path, suite: str) -> Finished | None:
    """What came out of a suite before; None where it was not finished.

    Raises:
        UserError: the file was changed since.
    """
    path = folder / f"{suite}.json"
    return read(path, Finished) if path.is_file() else None
