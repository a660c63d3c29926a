"""Manages a worker process from the parent: starts it when needed, enforces time limits, replaces it after a crash."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from types import TracebackType
from typing import IO

from harness.efficiency.jobs import Hello, Job, Reply
from harness.errors import without_secrets
from harness.records.device import DeviceKind, DeviceRecord

START_S = 300.0
"""Time limit for a worker's start, in seconds: imports and the device's context, on a slow disk."""

LONGEST_WAIT_S = 3600.0
"""Upper limit of one wait, in seconds: the system call does not accept infinity."""


class TimeIsUpError(Exception):
    """The job did not finish within its time limit; its process was killed."""


class Worker:
    """One worker process at a time.

    Args:
        device: of the jobs; None for forecasts, which use no device.
        command: replaces the command that starts the worker's module.
    """

    def __init__(self, device: DeviceKind | None, command: Sequence[str] | None = None) -> None:
        own = [sys.executable, "-m", "harness.efficiency.worker"]
        self._command = [*(own if command is None else command), device or "forecasts"]
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._unread = b""
        self.device: DeviceRecord | None = None
        """The device that the process reported."""

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, timeout_s: float = START_S) -> None:
        """Start the process if none is running.

        Raises:
            TimeIsUpError: it did not start in time.
            RuntimeError: it ended instead; the message contains the end of its stderr.
        """
        if self._process is not None:
            return
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed by `stop`
        self._unread = b""
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )
        line = self._read_line(timeout_s)
        if line is None:
            raise RuntimeError(f"the worker did not start: {self._how_it_ended()}")
        self.device = Hello.model_validate_json(line).device

    def run(self, job: Job, timeout_s: float) -> Reply:
        """Run a job; if the process crashes, the reply says so, and the next job gets a new process.

        Raises:
            TimeIsUpError: the job exceeded its time limit.
        """
        until = time.monotonic() + timeout_s
        self.start(timeout_s)
        assert self._process is not None
        assert self._process.stdin is not None
        line = None
        try:
            self._process.stdin.write(job.model_dump_json().encode() + b"\n")
            self._process.stdin.flush()
            line = self._read_line(until - time.monotonic())
        except BrokenPipeError:
            pass
        if line is None:
            return Reply(status="error", why=self._how_it_ended(), clean=False)
        reply = Reply.model_validate_json(line)
        if reply.status == "error":
            print(self._end_of_stderr(40), file=sys.stderr, flush=True)
        if not reply.clean:
            self.stop()
        return reply

    def stop(self) -> None:
        """End the process, if one is running."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def _read_line(self, timeout_s: float) -> bytes | None:
        """The next line from the process; None if the process ended."""
        assert self._process is not None
        assert self._process.stdout is not None
        until = time.monotonic() + timeout_s
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._unread:
            left = until - time.monotonic()
            ready, _, _ = select.select([descriptor], [], [], max(0.0, min(left, LONGEST_WAIT_S)))
            if not ready and left > LONGEST_WAIT_S:
                continue
            if not ready:
                self.stop()
                raise TimeIsUpError(f"not done after {timeout_s:.0f} s")
            piece = os.read(descriptor, 1 << 16)
            if not piece:
                return None
            self._unread += piece
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _how_it_ended(self) -> str:
        """How the process ended, in one line; prints the end of its stderr."""
        assert self._process is not None
        code = self._process.wait(timeout=60)
        words = self._end_of_stderr(40)
        self.stop()
        if words:
            print(words, file=sys.stderr, flush=True)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        last = words.splitlines()[-1].strip() if words else "without a word"
        return f"the worker process ended by {how} ({last})"

    def _end_of_stderr(self, lines: int) -> str:
        assert self._errors is not None
        self._errors.seek(0)
        return without_secrets("\n".join(self._errors.read().decode(errors="replace").splitlines()[-lines:]))
