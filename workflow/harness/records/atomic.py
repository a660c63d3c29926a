"""Files that are either complete or absent: written to a temporary path, flushed to the disk, then renamed.

What a killed process leaves half-written is removed by whoever writes the same file next: a temporary path is locked
(`flock`) while its writer lives.
"""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on a clean exit it is flushed and renamed to `path`."""
    with _temporary(path, Path.touch) as temporary:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The same for a folder; an existing folder at `path` is replaced."""
    with _temporary(path, Path.mkdir) as temporary:
        yield temporary
        for file in temporary.rglob("*"):
            _flush(file)
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
        _flush(path.parent)


@contextmanager
def _temporary(path: Path, make: Callable[[Path], None]) -> Iterator[Path]:
    """A new, locked temporary path beside `path`, after those of dead writers have been removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        if (descriptor := _locked(left)) is not None:
            _remove(left)
            os.close(descriptor)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    _remove(temporary)
    make(temporary)
    while (descriptor := _locked(temporary)) is not None and not temporary.exists():
        os.close(descriptor)  # taken for a dead writer's before it was locked
        make(temporary)
    try:
        yield temporary
    finally:
        _remove(temporary)
        if descriptor is not None:
            os.close(descriptor)


def _locked(path: Path) -> int | None:
    """A descriptor that holds the lock of a file or folder; None where its writer has it, or no lock can be had."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # gone meanwhile
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # held; or a file system without such locks, as some shared ones are
        os.close(descriptor)
        return None
    return descriptor


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all; NaN and infinity are refused."""
    write_text(path, _indented(value))


def write_many_json(values: Iterable[tuple[Path, Any]]) -> None:
    """Write many files as `write_json` does, each whole or not at all; the disk is waited for once every 200 files.

    After a loss of power the last ones may be absent, so this is for files that are written again where absent.
    """
    left = iter(values)
    while some := list(islice(left, 200)):  # each has a descriptor open, of which a process has 1,024
        with ExitStack() as stack:
            written = []
            for path, value in some:
                temporary = stack.enter_context(_temporary(path, Path.touch))
                temporary.write_text(_indented(value), encoding="utf-8")
                written.append((temporary, path))
            os.sync()
            for temporary, path in written:
                os.replace(temporary, path)


def _indented(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
