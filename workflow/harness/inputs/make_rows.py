"""Rows of a task: read from files or generated, split by seed, written with a manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from harness.errors import UserError
from harness.inputs.generated import suite_rows, training_rows
from harness.inputs.rows import Row, read_rows
from harness.records.atomic import sha256, write_json
from harness.records.code import ROWS
from harness.records.provenance import provenance
from harness.records.run import RowsRecord
from harness.study.jobs import RowsJob, SuiteJob
from harness.study.paths import resolve
from harness.study.spec import FileRows, FileSuite


def make_rows(job: RowsJob, folder: Path) -> RowsRecord:
    """Write train.json, validation.json and manifest.json into `folder`; the manifest is last and marks completion.

    Files: rows without an output are dropped and counted, the rest is shuffled by the source's seed; the first
    `validation_rows` are for validation, the next `train_rows` (or all) for training. A question that occurs twice in
    a file may end up in both. Generated: see `harness.inputs.generated`.

    Raises UserError if the files hold too few rows.
    """
    source = job.source
    if isinstance(source, FileRows):
        paths = [resolve(text) for text in source.paths]
        rows = [row for path in paths for row in read_rows(path)]
        usable = [row for row in rows if row["output"].strip()]
        splits = _shuffled_split(usable, source)
        return _written(job.name, folder, splits, read=paths, dropped=len(rows) - len(usable))
    splits = {
        "train": training_rows(source.family, split="train", count=source.train_rows, seed=source.seed),
        "validation": training_rows(source.family, split="validation", count=source.validation_rows, seed=source.seed),
    }
    return _written(job.name, folder, splits)


def make_suite(job: SuiteJob, folder: Path) -> RowsRecord:
    """Write test.json and, last, manifest.json into `folder`; rows of a file keep their order."""
    source = job.source
    if isinstance(source, FileSuite):
        path = resolve(source.path)
        return _written(job.name, folder, {"test": read_rows(path)[: source.limit]}, read=[path])
    rows = suite_rows(source.variant, split="test", count=source.rows, seed=source.seed)
    return _written(job.name, folder, {"test": rows})


def _shuffled_split(rows: Sequence[Row], source: FileRows) -> dict[str, list[Row]]:
    wanted = source.validation_rows + (source.train_rows or 1)
    if len(rows) < wanted:
        raise UserError(
            f"{', '.join(source.paths)}: {len(rows)} rows with an output, but train_rows and validation_rows ask for "
            f"{'at least ' if source.train_rows is None else ''}{wanted}; ask for fewer"
        )
    order = np.random.default_rng(source.seed).permutation(len(rows))
    shuffled = [rows[i] for i in order]
    stop = None if source.train_rows is None else wanted
    return {"train": shuffled[source.validation_rows : stop], "validation": shuffled[: source.validation_rows]}


def _written(
    name: str, folder: Path, splits: dict[str, list[Row]], *, read: Sequence[Path] = (), dropped: int = 0
) -> RowsRecord:
    for split, rows in splits.items():
        write_json(folder / f"{split}.json", rows)
    record = RowsRecord(
        name=name,
        files_sha256={f"{split}.json": sha256(folder / f"{split}.json") for split in splits},
        rows={split: len(rows) for split, rows in splits.items()},
        dropped_rows=dropped,
        dropped_why="empty output" if dropped else None,
        provenance=provenance(roots=ROWS, inputs={f"file {n}": path for n, path in enumerate(read, start=1)}),
    )
    write_json(folder / "manifest.json", record.model_dump(mode="json"))
    return record
