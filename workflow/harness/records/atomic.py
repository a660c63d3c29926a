"""Files that are either complete or absent: written to a temporary path, flushed to the disk, then renamed.

What a killed process leaves half-written is removed by whoever writes the same file next: a temporary path is locked
(`flock`) while its writer lives. A disk that is full, or that must not be written to, is one line for the user; what
stood at the path before stays.
"""

from __future__ import annotations

import errno
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

from pydantic import BaseModel

from harness.errors import UserError, without_secrets
from harness.records.units import MIB

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)
_FULL_BYTES = 2**20
"""A disk with less free space is taken for full where a library does not say what failed."""


@contextmanager
def whole_file(path: Path, *, needs_bytes: int | None = None) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on a clean exit it is flushed and renamed to `path`.

    Args:
        path: of the file.
        needs_bytes: its size, where it is about known; said where the disk is full.

    Raises:
        UserError: the disk is full, or must not be written to.
    """
    with _temporary(path, Path.touch, needs_bytes) as temporary:
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
def _temporary(path: Path, make: Callable[[Path], None], needs_bytes: int | None = None) -> Iterator[Path]:
    """A new, locked temporary path beside `path`, after those of dead writers have been removed."""
    temporary, descriptor = path.with_name(f".{path.name}.{os.getpid()}.part"), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
            if (descriptor := _locked(left)) is not None:
                _remove(left)
                os.close(descriptor)
        _remove(temporary)
        make(temporary)
        while (descriptor := _locked(temporary)) is not None and not temporary.exists():
            os.close(descriptor)  # taken for a dead writer's before it was locked
            make(temporary)
        yield temporary
    except Exception as error:
        # here, before what is half-written is removed and the disk has room again
        why = next(filter(None, (_of_the_disk(cause, path.parent, needs_bytes) for cause in _causes(error))), None)
        if why is None:
            raise
        raise UserError(f"{path} cannot be written: {why}; then run the same command again") from error
    finally:
        _remove(temporary)
        if descriptor is not None:
            os.close(descriptor)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised in handling of: torch hides the disk's own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _of_the_disk(error: BaseException, folder: Path, needs_bytes: int | None) -> str | None:
    """What is wrong with the disk of `folder`, and the mend; None where the error is another one."""
    place = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(place).free
    if isinstance(error, OSError) and error.errno is not None:
        named = error.filename is None or Path(str(error.filename)).is_relative_to(place)
        if error.errno in _NOT_ALLOWED and named:
            return f"{place} must not be written to ({error.strerror}): allow it"
        full = error.errno in _NO_SPACE
    else:
        # torch and safetensors have errors of their own; torch's do not say why a write failed
        told = "PytorchStreamWriter" in str(error) or "iostream error" in str(error)
        full = "No space left on device" in str(error) or (told and free < _FULL_BYTES)
    if not full:
        return None
    needed = "" if needs_bytes is None else f", about {needs_bytes / MIB:,.1f} MiB are needed"
    return f"the disk of {place} is full: {free / MIB:,.1f} MiB are free{needed}; free some"


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


def write_record(path: Path, record: BaseModel) -> None:
    """Write a record as `write_json` does, with a seal: `harness.records.reading.read` refuses one that was changed.

    Access tokens, which a library's words can quote, are masked.
    """
    text = json.dumps(record.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, sealed(without_secrets(text)))


def sealed(text: str) -> str:
    """The text of a JSON object, indented by two spaces, with a last key that holds the hash of all before it."""
    body = text.removesuffix("\n").removesuffix("\n}")
    return f'{body},\n  "seal": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'


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
