"""Locks that a dead process cannot hold: the kernel's own (`flock`), which it drops when the process ends, however.

Some shared file systems have none. There a job goes on without: it cannot know of another process that does the same.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.progress import duration, say
from harness.sign import sign_of

POLL_S = 2.0
"""Seconds between two tries of a waiting process."""
COMMAND_LENGTH = 200
"""Characters of the holder's command that are shown to others."""
_HAS_NONE = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}
"""Answers of a file system without locks: Lustre mounted without `flock`, NFS without its lock daemon."""


class NoLocksError(UserError):
    """The file system has no locks."""


def try_lock(path: Path) -> int | None:
    """An open descriptor that holds the lock until it is closed, or None where another process, or this one, holds it.

    The file then describes the holder, see `holder`.

    Raises:
        NoLocksError: the file system has no locks.
    """
    while True:
        # not truncated: it holds the present holder's description
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _HAS_NONE:
                raise
            path.unlink(missing_ok=True)
            raise NoLocksError(
                f"{path.parent}: this file system has no locks (flock: {error.strerror}); use a folder on another one, "
                "or have it mounted with locks"
            ) from None
        if _is_still(path, descriptor):
            break
        os.close(descriptor)  # the last holder removed the file between our two calls
    described = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "command": _command(),
        "since": datetime.now().isoformat(" ", "minutes"),
    }
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps(described).encode())
    return descriptor


def holder(path: Path) -> tuple[int, str] | None:
    """Process number and description of a lock's holder; None while it has not described itself, or is gone."""
    try:
        held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, FileNotFoundError):
        return None
    return held["pid"], f"process {held['pid']} since {held['since']} ({held['command']})"


@contextmanager
def one_at_a_time(output: Path, *, poll_s: float = POLL_S) -> Iterator[bool]:
    """Hold the lock of the job that writes `output`, which may have survived the Snakemake that started it.

    Waits for another process that does the same job. Without the output's folder there is no such process, and no lock;
    a file system without locks has none either.

    Yields:
        Whether the job is still to be done: not where the other process has written `output` meanwhile.
    """
    if not output.parent.is_dir():
        yield True
        return
    path, started = lock_of(output), time.monotonic()
    told = False
    try:
        descriptor = try_lock(path)
    except NoLocksError:
        yield True
        return
    while descriptor is None:
        if not told:
            told = True
            who = holder(path)
            say(f"{output}: {who[1] if who else 'another process'} does this job; waiting for it to end")
        time.sleep(poll_s)
        descriptor = try_lock(path)
    if told:
        say(f"{output}: the other process ended after {duration(time.monotonic() - started)}")
    try:
        yield not (told and output.exists())
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def remove_left(output: Path) -> None:
    """Remove lock and sign of a job that was killed between its output and its end: nobody would do that job again."""
    path = lock_of(output)
    if not (path.exists() and output.exists()):
        return
    try:
        descriptor = try_lock(path)
    except NoLocksError:
        return
    if descriptor is not None:
        sign_of(output).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        os.close(descriptor)


def lock_of(output: Path) -> Path:
    """The lock of the job that writes `output`."""
    return output.with_name(f".{output.name}.lock")


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _command() -> str:
    """How this process was started, on one line."""
    program, *rest = sys.orig_argv
    return " ".join(" ".join([Path(program).name, *rest]).split())[:COMMAND_LENGTH]
