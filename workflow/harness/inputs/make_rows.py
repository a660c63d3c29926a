"""Rows of a task: read or generated, split by seed, written with a manifest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from harness.errors import UserError
from harness.inputs import overlap
from harness.inputs.files import read_values
from harness.inputs.generated import suite_rows, training_rows
from harness.inputs.hub_rows import read_data_set
from harness.inputs.rows import Row, fits, rows_of
from harness.records.atomic import sha256, write_json, write_record
from harness.records.code import ROWS
from harness.records.inputs import RowsRecord
from harness.records.provenance import provenance
from harness.study.jobs import RowsJob, SuiteJob
from harness.study.paths import resolve
from harness.study.sources import (
    Columns,
    FileRows,
    FileSuite,
    GeneratedRows,
    GeneratedSuite,
    HubRows,
    HubSuite,
    LmEvalSuite,
)


def make_rows(job: RowsJob, folder: Path) -> RowsRecord:
    """Write train.json, validation.json and manifest.json into `folder`; the manifest is last and marks completion.

    Rows that are read: those without an output are dropped and counted, and so are those whose text occurs in a file of
    `without` (`harness.inputs.overlap.masked`); the rest is shuffled by the source's seed; the first `validation_rows`
    are for validation, the next `train_rows` (or all) for training. A question that occurs twice in a file may end up
    in both. Generated: see `harness.inputs.generated`.

    Raises UserError for a bad row (`harness.inputs.rows`), and if too few are left.
    """
    source = job.source
    if isinstance(source, GeneratedRows):
        drawn = {"train": source.train_rows, "validation": source.validation_rows}
        splits: dict[str, list[Row]] = {
            split: training_rows(source.family, split=split, count=count, seed=source.seed)  # type: ignore[arg-type]
            for split, count in drawn.items()
        }
        return _written(job.name, folder, splits)
    rows, files = _read(source)
    others = [resolve(text) for text in source.without]
    answered = [row for row in rows if row["output"].strip()]
    usable = overlap.without(answered, [row for path in others for row in _others(path, source.columns)])
    overlapping = len(answered) - len(usable)
    return _written(
        job.name,
        folder,
        _shuffled_split(usable, source, overlapping=overlapping),
        read={f"file {n}": path for n, path in enumerate(files, start=1)}
        | {f"without {n}": path for n, path in enumerate(others, start=1)},
        dropped=len(rows) - len(answered),
        overlapping=overlapping,
    )


def make_suite(job: SuiteJob, folder: Path, *, check: Callable[[Row], None] = lambda row: None) -> RowsRecord:
    """Write test.json and, last, manifest.json into `folder`; rows that are read keep their order.

    Args:
        job: a suite of test rows; data of lm-eval's own tasks are fetched by `harness.evaluating`.
        folder: where it goes.
        check: raises ValueError for a row that no answer could score as right.

    Raises:
        UserError: there are no rows, or `check` refuses one of them, named with its place.
    """
    source = job.source
    if isinstance(source, GeneratedSuite):
        files: list[Path] = []
        rows = suite_rows(source.variant, split="test", count=source.rows, seed=source.seed)
        places = [f"row {n}" for n in range(1, len(rows) + 1)]
    else:
        assert not isinstance(source, LmEvalSuite)
        values, files = _values(source)
        values = values[: source.limit]
        rows, places = rows_of(values, source.columns), [where for where, _ in values]
        if not rows:
            raise UserError(f"{job.label}: {_named(source)} holds no rows to score; give it rows")
    for row, where in zip(rows, places, strict=True):
        try:
            check(row)
        except ValueError as error:
            raise UserError(f"{where}: {error}; correct the row or the suite's `scoring`") from None
    read = {f"file {n}": path for n, path in enumerate(files, start=1)}
    return _written(job.name, folder, {"test": rows}, read=read)


Read = FileRows | HubRows | FileSuite | HubSuite
"""Sources whose rows are read."""


def _read(source: FileRows | HubRows) -> tuple[list[Row], list[Path]]:
    if isinstance(source, HubRows):
        values, files = read_data_set(source)
        return rows_of(values, source.columns), files
    parts = [(resolve(text), columns) for text, columns in source.files]
    return [row for path, columns in parts for row in rows_of(read_values(path), columns)], [path for path, _ in parts]


def _values(source: FileSuite | HubSuite) -> tuple[list[tuple[str, Any]], list[Path]]:
    if isinstance(source, HubSuite):
        return read_data_set(source)
    file = resolve(source.path)
    return list(read_values(file)), [file]


def _named(source: Read) -> str:
    """What the config calls a source."""
    if isinstance(source, HubRows | HubSuite):
        return f"{source.repo} {source.split}"
    return ", ".join(text for text, _ in source.files) if isinstance(source, FileRows) else source.path


def _others(path: Path, columns: Columns | None) -> list[Row]:
    """Rows of a file that training rows must not repeat: with the training rows' columns where it has them."""
    values = read_values(path)
    if columns is not None and columns.instruction is not None:
        # only what is asked is compared: a test set need not have the column that training is to write
        columns = columns.model_copy(update={"output": columns.instruction, "answer": None})
    return rows_of(values, columns if columns is not None and fits(columns, values) else None)


def _shuffled_split(rows: Sequence[Row], source: FileRows | HubRows, *, overlapping: int) -> dict[str, list[Row]]:
    wanted = source.validation_rows + (source.train_rows or 1)
    if len(rows) < wanted:
        more = f" ({overlapping} more occur in `without`)" if overlapping else ""
        raise UserError(
            f"{_named(source)}: {len(rows)} rows with an output{more}, but train_rows and validation_rows ask for "
            f"{'at least ' if source.train_rows is None else ''}{wanted}; ask for fewer, or give more rows"
        )
    order = np.random.default_rng(source.seed).permutation(len(rows))
    shuffled = [rows[i] for i in order]
    stop = None if source.train_rows is None else wanted
    return {"train": shuffled[source.validation_rows : stop], "validation": shuffled[: source.validation_rows]}


def _written(
    name: str,
    folder: Path,
    splits: Mapping[str, Sequence[Row]],
    *,
    read: Mapping[str, Path] = MappingProxyType({}),
    dropped: int = 0,
    overlapping: int = 0,
) -> RowsRecord:
    for split, rows in splits.items():
        write_json(folder / f"{split}.json", rows)
    record = RowsRecord(
        name=name,
        files_sha256={f"{split}.json": sha256(folder / f"{split}.json") for split in splits},
        rows={split: len(rows) for split, rows in splits.items()},
        dropped_rows=dropped,
        dropped_why="empty output" if dropped else None,
        overlapping_rows=overlapping,
        provenance=provenance(roots=ROWS, inputs=read),
    )
    write_record(folder / "manifest.json", record)
    return record
