"""A copy of what a job says on stderr, for its log; whoever started the job sees every line as before."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from harness.errors import UserError


@contextmanager
def copied_stderr(path: Path) -> Iterator[None]:
    """Copy what Python code writes to `sys.stderr` inside the block into the file `path`, begun anew.

    The stream itself stays as it is, so that progress is seen at once and a crash of the interpreter loses nothing;
    what C code writes past it is not copied.

    Raises:
        UserError: nothing can be written there.
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
    """The stream `own` in everything, with a copy of each text; libraries keep it beyond the block."""

    def __init__(self, own: IO[str], log: IO[str]) -> None:
        self._own, self._log = own, log

    def write(self, text: str) -> int:
        """Write to both."""
        if not self._log.closed:
            self._log.write(text)
        return self._own.write(text)

    def writelines(self, lines: list[str]) -> None:
        """Write to both."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)
