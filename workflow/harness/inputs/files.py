"""Data files as plain values: JSON, JSON Lines, CSV and Parquet, each also gzipped."""

from __future__ import annotations

import csv
import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

from harness.errors import UserError, first_line

KINDS = (".json", ".jsonl", ".csv", ".parquet")


def read_values(path: Path) -> list[tuple[str, Any]]:
    """Every row of a file, in its order, with its place for messages ("<file>, row 3").

    The kind is told by the file's name. Text is UTF-8, with a byte-order mark or without. Rows are counted from 1; in
    JSON Lines empty lines count, in CSV the header does not.

    Raises:
        UserError: the file is missing, of no such kind, damaged, or cannot be read as what its name says; one line.
    """
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind not in KINDS:
        raise UserError(f"{path}: rows are read from {', '.join(KINDS)}, each also as .gz; name the file as what it is")
    read = {".json": _json, ".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet}[kind]
    return [(f"{path}, row {number}", row) for number, row in read(_bytes(path), path)]


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path in the config and the variables in it")
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read as gzipped ({error}); save it so, or name it as what it is") from error


def _text(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); save it so") from error


def _json(data: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    try:
        values = json.loads(_text(data, path))
    except json.JSONDecodeError as error:
        lines = "; a file with one row a line is named .jsonl" if error.msg == "Extra data" else ""
        raise UserError(f"{path}: not JSON ({error}){lines}") from error
    if not isinstance(values, list):
        raise UserError(
            f"{path}: expected a list of rows, found {type(values).__name__}; write the rows as [{{...}}, ...]"
        )
    return enumerate(values, start=1)


def _json_lines(data: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    # Not splitlines: a JSON string may hold U+2028, which is no line end in JSON lines.
    for number, line in enumerate(_text(data, path).split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, row {number}: not JSON ({error}); .jsonl holds one row a line") from error


def _csv(data: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a cell may hold a whole document
    number = 0
    try:
        lines = csv.reader(StringIO(_text(data, path), newline=""), strict=True)
        header = next(lines, [])
        if len(set(header)) != len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise UserError(f"{path}: two columns are called {twice!r}; rename one")
        for cells in lines:
            if cells:
                number += 1
                if len(cells) != len(header):
                    raise UserError(
                        f"{path}, row {number}: {len(cells)} cells, but the header has {len(header)} "
                        f"({_shown(header)}); put cells with a comma or a line break in double quotes"
                    )
                yield number, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, row {number + 1}: not CSV ({error}); look at its double quotes") from error


def _parquet(data: bytes, path: Path) -> Iterator[tuple[int, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        rows = read_table(BytesIO(data)).to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({first_line(error)}); fetch or write it again") from error
    return enumerate(rows, start=1)


def _shown(names: list[str]) -> str:
    return ", ".join(map(repr, names))
