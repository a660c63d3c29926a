"""Rows of a task: read from files or generated, split by seed, written with a manifest."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harness.errors import UserError
from harness.inputs.generated import suite_rows, training_rows
from harness.inputs.prompts import Row
from harness.records.atomic import sha256, write_json
from harness.records.code import ROWS
from harness.records.provenance import provenance
from harness.records.run import RowsRecord
from harness.study.paths import resolve
from harness.study.spec import FileRows, FileSuite, RowsJob, SuiteJob

__all__ = ["Row", "make_rows", "make_suite", "read_rows"]

_CALCULATOR = re.compile(r"<<[^>]*>>")
_FIELDS = ("instruction", "input", "output", "answer")
_SHAPES = f"{', '.join(_FIELDS)} (LLM-Adapters .json) or question, answer (GSM8K .jsonl)"


def read_rows(path: Path) -> list[Row]:
    """Rows of an LLM-Adapters file (`.json`, `.json.gz`) or of a GSM8K file (`.jsonl`), in file order.

    GSM8K: `question` becomes the instruction; the calculator marks `<<...>>` are taken out of the rationale and the
    last line `#### N` becomes "The answer is N.", so that the last number of the output is the answer; `answer` is N
    without thousands commas.

    Raises UserError, naming file and row (counted from 1), for a missing file, text that is not JSON, a missing or
    non-text field and a non-empty `input` (the short prompt template has no place for it).
    """
    text = _text(path)
    try:
        if path.name.endswith(".jsonl"):
            return [_gsm8k(json.loads(line), where=f"{path}, row {n}") for n, line in _lines(text)]
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); expected LLM-Adapters .json or GSM8K .jsonl") from error
    if not isinstance(values, list):
        raise UserError(
            f"{path}: expected a list of rows, found {type(values).__name__}; write the rows as [{{...}}, ...]"
        )
    return [_llm_adapters(value, where=f"{path}, row {n}") for n, value in enumerate(values, start=1)]


def make_rows(job: RowsJob, folder: Path) -> RowsRecord:
    """Write train.json, validation.json and, last, manifest.json into `folder`: where it stands, the rest is whole.

    Files: rows without an output are dropped and counted, the rest is shuffled by the source's seed; the first
    `validation_rows` are for validation, the next `train_rows` (or all) for training. A question that a file holds
    twice may land on both sides. Generated: see `harness.inputs.generated`.

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
        provenance=provenance(sources=ROWS, inputs={f"file {n}": path for n, path in enumerate(read, start=1)}),
    )
    write_json(folder / "manifest.json", record.model_dump(mode="json"))
    return record


def _text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path in the config and the variables in it")
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        kind = "gzipped " if path.suffix == ".gz" else ""
        raise UserError(
            f"{path}: cannot be read as {kind}UTF-8 text ({error}); save it so, or name it as what it is"
        ) from error


def _lines(text: str) -> list[tuple[int, str]]:
    # Not splitlines: a JSON string may hold U+2028, which is no line end in JSON lines.
    return [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _field(value: Any, key: str, *, where: str) -> str:
    if not isinstance(value, dict) or key not in value:
        raise UserError(f"{where}: no field '{key}'; a row has {_SHAPES}")
    if not isinstance(value[key], str):
        raise UserError(f"{where}: field '{key}' is {type(value[key]).__name__}, expected text: put it in quotes")
    return str(value[key])


def _llm_adapters(value: Any, *, where: str) -> Row:
    instruction, extra, output, answer = (_field(value, key, where=where) for key in _FIELDS)
    if extra:
        raise UserError(f"{where}: field 'input' is not empty; move its text into 'instruction'")
    return Row(instruction=instruction, input="", output=output, answer=answer)


def _gsm8k(value: Any, *, where: str) -> Row:
    question, solution = _field(value, "question", where=where), _field(value, "answer", where=where)
    rationale, mark, final = solution.rpartition("####")
    if not mark:
        raise UserError(f"{where}: field 'answer' has no '#### N' at its end; add the final number")
    answer = final.strip().replace(",", "")
    worked = _CALCULATOR.sub("", rationale).strip()
    return Row(instruction=question, input="", output=f"{worked}\nThe answer is {answer}.".lstrip(), answer=answer)
