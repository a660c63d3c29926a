"""Signs of life: what a job does now, in a small file beside its output, for `python -m harness status`.

Whoever knows something says it here (`tell`); without a file to write to, nothing happens. A sign is no record: it is
not flushed to the disk, a disk that cannot take it fails no job, and it is gone when the job ends by itself. Imports
nothing of ours.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

EVERY_S = 5.0
"""Seconds between two signs of work whose units are short; a new phase is told at once."""


class _Sign:
    """The file of this process, and what stands in it."""

    def __init__(self, path: Path) -> None:
        self.path, self.written = path, 0.0
        self.said: dict[str, Any] = {"pid": os.getpid(), "host": socket.gethostname()}

    def write(self) -> None:
        temporary = self.path.with_name(f"{self.path.name}.{self.said['pid']}")
        with suppress(OSError):
            temporary.write_text(json.dumps(self.said), encoding="utf-8")
            os.replace(temporary, self.path)
        self.written = time.monotonic()


_mine: _Sign | None = None


def sign_of(output: Path) -> Path:
    """The sign of the job that writes `output`."""
    return output.with_name(f".{output.name}.sign")


@contextmanager
def signing(output: Path) -> Iterator[None]:
    """Inside the block, what is told goes into the sign of the job that writes `output`. A killed process leaves it."""
    global _mine
    if not output.parent.is_dir():
        yield
        return
    outer, _mine = _mine, _Sign(sign_of(output))
    _mine.write()
    try:
        yield
    finally:
        with suppress(OSError):
            _mine.path.unlink(missing_ok=True)
        _mine = outer


def due() -> bool:
    """Whether the last sign is old enough for another."""
    return _mine is not None and time.monotonic() - _mine.written >= EVERY_S


def tell(**facts: Any) -> None:
    """Add to what is said, as plain JSON values, and write it; None takes a fact back. Nothing new is not written."""
    if _mine is None:
        return
    before = dict(_mine.said)
    _mine.said = {key: value for key, value in {**before, **facts}.items() if value is not None}
    if _mine.said != before:
        _mine.write()
