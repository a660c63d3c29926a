"""Whether this process had the processors that it wanted: how long its threads ran, and how long they had to wait.

On a CPU, a step beside other work takes longer by no fault of the method. The kernel tells the two times apart,
whatever the number of threads: a thread that sleeps, or waits for another thread of its process, is in neither.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

WAITED_LIMIT = 0.1
"""Largest share of the time wanted that may have been waited for; speed measured under more is void. Two jobs on two
processors wait for 1 to 2 %."""


@dataclass(frozen=True)
class ProcessorTime:
    """Seconds of all threads together."""

    ran_s: float
    waited_s: float | None
    """Ready to run, with no processor free; None where the kernel does not say."""

    @classmethod
    def now(cls) -> ProcessorTime:
        """Of this process since it began."""
        return cls(time.process_time(), _waited_s())

    def since(self, before: ProcessorTime) -> ProcessorTime:
        """From `before` to this. (What threads that have ended since waited for is lost: it never goes below 0.)"""
        known = self.waited_s is not None and before.waited_s is not None
        return ProcessorTime(
            self.ran_s - before.ran_s, max(0.0, self.waited_s - before.waited_s) if known else None  # type: ignore[operator]
        )  # fmt: skip


def crowded_why(*, ran_s: float, waited_s: float | None, wall_s: float) -> str | None:
    """Why the speed of something is void: other work held the processors; None if it did not.

    Args:
        ran_s: processor time of all threads.
        waited_s: time they waited; None: what a thread that always has work to do would lack of `wall_s`.
        wall_s: time that passed.
    """
    waited = max(0.0, wall_s - ran_s) if waited_s is None else waited_s
    share = waited / (ran_s + waited) if ran_s + waited else 0.0
    if share <= WAITED_LIMIT:
        return None
    return (
        f"other work held the processors for {100 * share:.0f} % of the time that the steps wanted one "
        f"({100 * WAITED_LIMIT:.0f} % are allowed)"
    )


def _waited_s() -> float | None:
    """Sum over the threads of this process; the second number of `schedstat`, in nanoseconds."""
    total, seen = 0, False
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError, ValueError, IndexError):  # a thread may end meanwhile
            total += int(file.read_text().split()[1])
            seen = True
    return total / 1e9 if seen else None
