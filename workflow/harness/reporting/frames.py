"""The flat tables of a study: built from rows, written, and read back with their columns checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from pandas import DataFrame
from pyarrow.parquet import ParquetFile

from harness.errors import UserError, first_line
from harness.records.atomic import whole_file
from harness.records.columns import ADDED, ADDED_TABLES, FRAMES

_COLLECT = "delete it and let Snakemake make it anew"


class FrameError(Exception):
    """Rows that do not fit a table; the message names the table, the column and the fault."""


@dataclass(frozen=True, kw_only=True)
class Frames:
    """The tables that a report is made from; their columns are those of `harness.records.columns.FRAMES`."""

    runs: DataFrame
    scores: DataFrame
    documents: DataFrame
    lm_eval: DataFrame
    lm_eval_documents: DataFrame
    trials: DataFrame
    steps: DataFrame
    believed: DataFrame
    observed: DataFrame
    probes: DataFrame
    probed: DataFrame
    overlaps: DataFrame
    overlapping: DataFrame

    def ok_runs(self) -> DataFrame:
        """Runs that count in averages: all but those that were disengaged, diverged, skipped or out of memory."""
        return self._ok_runs

    def believed_by(self, run: str) -> DataFrame:
        """A run's rows of `believed`; none if it has none."""
        return self._believed_by_run.get(run, self.believed.iloc[:0])

    def observed_by(self, run: str) -> DataFrame:
        """A run's rows of `observed`; none if it has none."""
        return self._observed_by_run.get(run, self.observed.iloc[:0])

    # grouped once: a filter a run takes a time that grows as the square of the runs
    @cached_property
    def _believed_by_run(self) -> dict[Any, DataFrame]:
        return dict(iter(self.believed.groupby("run")))

    @cached_property
    def _observed_by_run(self) -> dict[Any, DataFrame]:
        return dict(iter(self.observed.groupby("run")))

    def ok_scores(self) -> DataFrame:
        """Scores of the runs that count, with the run's model, task, method and seed beside them."""
        return self._ok_scores

    @cached_property
    def _ok_runs(self) -> DataFrame:
        return self.runs[self.runs["status"] == "ok"]

    @cached_property
    def _ok_scores(self) -> DataFrame:
        keys = self.ok_runs()[["run", "model", "task", "method", "seed"]]
        return self.scores.merge(keys, on="run", how="inner", validate="many_to_one")


def rows_to_frame(name: str, rows: list[dict[str, Any]]) -> DataFrame:
    """One table from plain rows, cast to the column types of `FRAMES[name]`; no rows give an empty table.

    Raises:
        FrameError: a row lacks a column, has an unknown one, or a value does not fit its type.
    """
    columns = FRAMES[name]
    for number, row in enumerate(rows):
        if row.keys() != columns.keys():
            missing, unknown = sorted(columns.keys() - row.keys()), sorted(row.keys() - columns.keys())
            raise FrameError(f"{name}, row {number}: missing columns {missing}, unknown columns {unknown}")
    made: dict[str, Any] = {}
    for column, dtype in columns.items():
        try:
            made[column] = pd.array([row[column] for row in rows], dtype=dtype)  # type: ignore[call-overload]
        except (TypeError, ValueError, OverflowError) as error:
            raise FrameError(f"{name}: column {column!r} does not hold {dtype} values: {error}") from None
    return DataFrame(made)


def table_to_frame(name: str, table: DataFrame) -> DataFrame:
    """The columns of `FRAMES[name]` from a table, cast to their types; those that it lacks are null.

    Raises:
        FrameError: a value does not fit the type of its column.
    """
    made: dict[str, Any] = {}
    for column, dtype in FRAMES[name].items():
        try:
            values: Any = table[column] if column in table else pd.Series(None, index=table.index, dtype="object")
            made[column] = values.astype(dtype)
        except (TypeError, ValueError) as error:
            raise FrameError(f"{name}: column {column!r} does not hold {dtype} values: {error}") from None
    return DataFrame(made)


def refuse_link(folder: Path) -> None:
    """Of a folder that is about to be filled: published frames may come from a stranger, with links among them.

    Raises:
        UserError: it is a link.
    """
    if folder.is_symlink():
        raise UserError(f"{folder} is a link, and what is written must stay below {folder.parent}: remove it")


def write_frames(frames: Frames, folder: Path) -> None:
    """Write `<folder>/<name>.parquet` for every table; the same rows give the same bytes."""
    for field in fields(frames):
        table: DataFrame = getattr(frames, field.name)
        with whole_file(folder / f"{field.name}.parquet") as temporary:
            table.to_parquet(temporary, index=False, engine="pyarrow", compression="zstd")


def read_frames(folder: Path) -> Frames:
    """Inverse of `write_frames`.

    Raises:
        UserError: a file is missing or damaged, or its columns are not those of `FRAMES`.
    """
    return Frames(**{name: _read_named(folder, name) for name in FRAMES})


def _read_named(folder: Path, name: str) -> DataFrame:
    path = folder / f"{name}.parquet"
    if name in ADDED_TABLES and not path.exists():
        return rows_to_frame(name, [])
    return _read(path, FRAMES[name], ADDED.get(name, ()))


def read_table(path: Path, *, mend: str | None = None) -> pa.Table:
    """A parquet file, unchanged.

    Args:
        path: of the file.
        mend: what the user can do where it is damaged or missing; None: it is made by the collect stage.

    Raises:
        UserError: it does not exist, or cannot be read.
    """
    try:
        # threads cost more than they save where files are small and many
        with ParquetFile(path) as file:
            return file.read(use_threads=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {mend or 'run the collect stage first'}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no parquet file ({first_line(error)}); {mend or _COLLECT}") from error


def _read(path: Path, columns: dict[str, str], added: Sequence[str]) -> DataFrame:
    table: DataFrame = read_table(path).to_pandas()
    for column, dtype in columns.items():
        if column not in table and column in added:
            table[column] = pd.array([None] * len(table), dtype=dtype)  # type: ignore[call-overload]
        if column not in table:
            raise UserError(f"{path}: column {column!r} is missing; {_COLLECT}")
        found = str(table[column].dtype)
        if found != dtype:
            raise UserError(f"{path}: column {column!r} is {found}, should be {dtype}; {_COLLECT}")
    unknown = sorted(set(map(str, table.columns)) - columns.keys())
    if unknown:
        raise UserError(f"{path}: unknown columns {unknown}; {_COLLECT}")
    return table[list(columns)]
