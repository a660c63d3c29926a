"""The measuring process: `python -m harness.efficiency.worker cuda`. It reads jobs on stdin, and replies on stdout.

It is a separate process so that a crash leaves nothing behind, and it ends with its parent process. Output of libraries
goes to stderr.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import IO

from harness.efficiency.jobs import Hello, Job, Reply
from harness.errors import first_line
from harness.records.device import DeviceKind

Execute = Callable[[Job], Reply]
_PR_SET_PDEATHSIG = 1


def main(start: Callable[[DeviceKind | None], tuple[Hello, Execute]] | None = None) -> int:
    """Run jobs until stdin ends; returns 1 after a job that raised.

    Args:
        start: makes the greeting and the function that runs jobs, for a device or (None) for forecasts.
    """
    answers = _own_stdout()
    _end_with_parent()
    asked = sys.argv[1]
    device: DeviceKind | None = "cuda" if asked == "cuda" else "cpu" if asked == "cpu" else None
    hello, execute = (start or _start)(device)
    _write_line(answers, hello.model_dump_json())
    for line in _lines():
        try:
            reply = execute(Job.model_validate_json(line))
        except Exception as error:  # noqa: BLE001  reported to the parent, which records it; this process ends
            traceback.print_exc()
            _write_line(answers, Reply(status="error", why=_one_line(error), clean=False).model_dump_json())
            return 1
        _write_line(answers, reply.model_dump_json())
    return 0


def _start(device: DeviceKind | None) -> tuple[Hello, Execute]:
    if device is None:
        from harness.efficiency.forecasts import make_forecast

        return Hello(device=None), make_forecast
    from harness.measuring.meters import Meters

    meters = Meters(device)  # before torch initialises the device
    from harness.efficiency.measure import execute

    hello = Hello(device=meters.describe())
    # garbage is collected before each block, and is not looked for among all that was imported
    gc.freeze()
    # what libraries hold once the device was used is no cell's
    meters.clean()
    return hello, lambda job: execute(job, meters)


def _own_stdout() -> IO[str]:
    """A private handle on stdout for replies; from here on, file descriptor 1 is stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _end_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends for any reason; elsewhere the end of stdin must suffice."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)


def _lines() -> Iterator[str]:
    while line := sys.stdin.readline():
        yield line


def _write_line(answers: IO[str], line: str) -> None:
    answers.write(line + "\n")
    answers.flush()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error) if str(error) else 'no message'}"


if __name__ == "__main__":
    sys.exit(main())
