"""Copies a job's stderr to its log; the terminal still shows every line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from harness.errors import UserError, without_secrets


@contextmanager
def copied_stderr(path: Path) -> Iterator[None]:
    """Copy what Python code writes to `sys.stderr` inside the block into the file `path`, which is overwritten.

    Access tokens do not reach the file.

    The stream itself is unchanged, so progress is visible at once and a crash of the interpreter loses nothing. Output
    that C code writes directly to the file descriptor is not copied.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("w", encoding="utf-8", buffering=1)
    except OSError as error:
        raise UserError(f"--log {path}: nothing can be written there ({error.strerror})") from error
    own = sys.stderr
    with log:
        sys.stderr = _Both(own, log)  # type: ignore[assignment]
        try:
            yield
        finally:
            sys.stderr = own


class _Both:
    """Acts like the stream `own`, and copies each text; libraries may keep a reference to it beyond the block."""

    def __init__(self, own: IO[str], log: IO[str]) -> None:
        self._own, self._log = own, log

    def write(self, text: str) -> int:
        """Write to both."""
        if not self._log.closed:
            self._log.write(without_secrets(text))
        return self._own.write(text)

    def writelines(self, lines: list[str]) -> None:
        """Write to both."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)
