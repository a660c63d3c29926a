"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere; and the job's sign.

A study runs several jobs in parallel, whose bars would overwrite one another. There each job prints a line when it ends
instead (`harness.study.progress`).
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from types import TracebackType

from harness import sign

STUDY_FILE = "GRASS_STUDY"
"""Environment variable of a study's jobs: path of the config file."""

LINE_EVERY_S = 20.0
"""Minimum seconds between two plain lines of one job: a short job prints nothing until it ends."""

SPEED_OVER = 12
"""Signs over which the speed in a sign is taken: a minute of short units."""


class Progress:
    """Counts `total` units of work under a label: a tqdm bar, or a line at every tenth of the work."""

    def __init__(self, total: int, label: str, *, unit: str = "step", done: int = 0) -> None:
        self.total, self.label, self.unit = total, label, unit
        self._done = self._first = done
        self._started = self._last_line = time.monotonic()
        self._tokens = 0
        self._marks = deque([(self._started, done, 0)], maxlen=SPEED_OVER)
        self._bar = None
        if sys.stderr.isatty() and STUDY_FILE not in os.environ:
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=label, unit=unit, initial=done, leave=False, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        sign.tell(label=self.label, unit=self.unit, done=self._done, total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sign.tell(label=None, unit=None, done=None, total=None, unit_s=None, tokens_per_s=None)
        if self._bar is not None:
            self._bar.close()

    def advance(self, note: str = "", *, tokens: int = 0) -> None:
        """One more unit is done; `note` is a short state, such as the loss, and `tokens` what the unit took of them."""
        self._done += 1
        self._tokens += tokens
        now = time.monotonic()
        if sign.due():
            self._sign(now, note)
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(1)
        elif (
            self._done * 10 // self.total > (self._done - 1) * 10 // self.total and now - self._last_line > LINE_EVERY_S
        ):
            self._last_line = now
            seconds = (now - self._started) / (self._done - self._first)
            left = duration((self.total - self._done) * seconds)
            counted = f"{self._done}/{self.total} {self.unit}s, {pace(seconds, self.unit)}, {left} left"
            say(f"{self.label}: {counted}{', ' + note if note else ''}")

    def _sign(self, now: float, note: str) -> None:
        since, first, tokens = self._marks[0]
        seconds, told = now - since, self._tokens - tokens
        sign.tell(
            done=self._done,
            note=note or None,
            unit_s=seconds / (self._done - first),
            tokens_per_s=told / seconds if told and seconds else None,
        )
        self._marks.append((now, self._done, self._tokens))


def say(line: str) -> None:
    """One line on stderr, at once."""
    print(line, file=sys.stderr, flush=True)


def pace(seconds: float, unit: str) -> str:
    """Speed of work whose units take `seconds` each: `4.2 steps/s`, or for slow units `2.5 s/step`, `21 s/step`."""
    if seconds < 1:
        return f"{1 / max(seconds, 1e-9):.1f} {unit}s/s"
    return f"{seconds:.1f} s/{unit}" if seconds < 9.95 else f"{seconds:.0f} s/{unit}"


def duration(seconds: float) -> str:
    """Seconds in readable form: `48 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
