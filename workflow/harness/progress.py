"""Progress of long work: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType


class Progress:
    """Count of `total` units of work under a label.

    On a terminal this is a tqdm bar. Elsewhere it prints a line at every tenth of the work, with rate and time left.
    """

    def __init__(self, total: int, label: str, *, unit: str = "step", done: int = 0) -> None:
        self.total, self.label, self.unit = total, label, unit
        self._done = self._first = done
        self._started = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=label, unit=unit, initial=done, leave=False, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, note: str = "") -> None:
        """One more unit is done; `note` is a short state, such as the loss."""
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(1)
        elif self._done * 10 // self.total > (self._done - 1) * 10 // self.total:
            spent = time.monotonic() - self._started
            rate = (self._done - self._first) / spent if spent > 0 else float("inf")
            left = (self.total - self._done) / rate
            print(
                f"{self.label}: {self._done}/{self.total} {self.unit}s, {rate:.1f} {self.unit}s/s, "
                f"{duration(left)} left{', ' + note if note else ''}",
                file=sys.stderr,
                flush=True,
            )


def duration(seconds: float) -> str:
    """Seconds as people say them: `48 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
