"""`python -m harness status`: what a study under way does now: done, running, failed, and the time to come."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from harness.study.hours import Hours
    from harness.study.paths import Paths
    from harness.study.plan import Plan
    from harness.study.status import Row, Running, Status

T = TypeVar("T")

EVERY_S = 3.0
"""Seconds between two looks of `--watch`; a study of many runs is looked at less often, see `_watch`."""
SHOWN = 10
"""Rows of a list on a terminal; elsewhere all are listed."""
_CLEAR = "\x1b[H\x1b[2J"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's command line."""
    parser.add_argument("--config", type=Path, required=True, help="config/<study>.yaml")
    parser.add_argument("--watch", action="store_true", help="look again every few seconds, until the study is over")


def run(args: argparse.Namespace) -> int:
    """Print the state of the study; nothing is written and nothing is locked."""
    from harness.study.config import load_study
    from harness.study.paths import Paths
    from harness.study.plan import resolve_study

    shown = _Shown(resolve_study(load_study(args.config, inputs_needed=False)), Paths())
    try:
        if args.watch:
            _watch(shown)
        else:
            shown.look()
            print("\n".join(shown.lines()))
    except KeyboardInterrupt:
        print()
    return 0


def _watch(shown: _Shown) -> None:
    """Print again and again; on a terminal in place, elsewhere when a job has begun or ended."""
    terminal, before = sys.stdout.isatty(), None
    while True:
        started = time.process_time()
        shown.look()
        over, counts = shown.over(), shown.counts()
        if terminal or counts != before or over:
            print(_CLEAR * terminal + "\n".join(shown.lines()) + "\n" * (not terminal), flush=True)
        if over:
            return
        before = counts
        # a tenth of one core at most
        time.sleep(max(EVERY_S, 10 * (time.process_time() - started)))


class _Shown:
    """A study as it is printed."""

    def __init__(self, plan: Plan, paths: Paths) -> None:
        from harness.study.status import Reader

        self._plan, self._paths, self._reader = plan, paths, Reader(plan, paths)
        self._hours: tuple[int, Hours | None] | None = None
        self._worked = False
        """Whether somebody was seen at work."""

    def look(self) -> None:
        """Read the study as it is now."""
        from harness.study.status import snakemake_here

        self.now: Status = self._reader.status()
        self._snakemake = snakemake_here(Path(".snakemake"))
        self._worked = self._worked or bool(self._snakemake or self.now.running)

    @property
    def _page(self) -> Path:
        return self._paths.study(self._plan.study.study) / "report.html"

    def over(self) -> bool:
        """Whether nothing more is to come: the study is finished, or whoever was at work has ended."""
        if self.now.all_done and self._page.is_file():
            return True
        return self._worked and not self.now.running and self._snakemake is False

    def counts(self) -> tuple[object, ...]:
        """What must have changed for another block of plain lines."""
        running = [(job.rule, job.name) for job in self.now.running]
        return self.now.done.total(), running, len(self.now.failed), len(self.now.stopped), self._snakemake

    def lines(self) -> Iterator[str]:
        """The whole text."""
        now, done, total = self.now, self.now.done.total(), self.now.total.total()
        waiting = total - done - len(now.running) - len(now.failed) - len(now.stopped)
        parts = [f"{done} of {total} jobs done", f"{len(now.running)} running", f"{waiting} waiting"]
        parts += [f"{len(now.failed)} failed"] * bool(now.failed) + [f"{len(now.stopped)} stopped"] * bool(now.stopped)
        yield f"{self._plan.study.study}: {', '.join(parts)}"
        yield "  " + ", ".join(f"{stage} {now.done[stage]}/{count}" for stage, count in now.total.items())
        yield f"  {self._to_come()}"
        yield from _section("running", now.running, _running)
        yield from _section("failed", now.failed, _row)
        yield from _section("stopped; the same command goes on from here", now.stopped, _row)
        yield from _section("done, but not ok", now.not_ok, _row)

    def _to_come(self) -> str:
        from harness.progress import duration

        if self.now.all_done:
            return f"finished: {self._page}" if self._page.is_file() else "all jobs are done; the page is to come"
        hours, at_once = self._hours_to_come(), max(1, len(self.now.running))
        text = "time to come: not known"
        if hours is not None:
            how = "at the pace of finished ones" if not hours.by_arithmetic else "a guess: no such job is done yet"
            if hours.by_arithmetic and hours.by_pace:
                how = f"{hours.by_arithmetic} of {hours.by_arithmetic + hours.by_pace} jobs by a guess"
            text = f"roughly {duration(hours.seconds / at_once)} to come with {at_once} at once ({how})"
        work = {True: "", False: "; no Snakemake works in this folder", None: ""}[self._snakemake]
        return text + work

    def _hours_to_come(self) -> Hours | None:
        """Computed anew when a job has ended."""
        from harness.errors import UserError
        from harness.study.hours import hours_to_come

        done = self.now.done.total()
        if self._hours is None or self._hours[0] != done:
            try:
                self._hours = done, hours_to_come(self._plan, self._paths)
            except (UserError, OSError):  # of a damaged record, which stands in its own row
                self._hours = done, None
        return self._hours[1]


def _section(title: str, listed: Sequence[T], text: Callable[[T], str]) -> Iterator[str]:
    if not listed:
        return
    yield title
    most = SHOWN if sys.stdout.isatty() else len(listed)
    for row in listed[:most]:
        # a log may hold anything, and a terminal would obey it
        yield "  " + "".join(c if c.isprintable() else "?" for c in text(row))
    if len(listed) > most:
        yield f"  and {len(listed) - most} more; all of them: without a terminal (| cat)"


def _row(row: Row) -> str:
    return f"{row.status:<10} {row.rule} {row.name}: {row.why}" + (f" ({row.log})" if row.log is not None else "")


def _running(job: Running) -> str:
    from harness.progress import duration, pace
    from harness.study.status import SILENT_S, doing, number, seconds_left

    facts = job.sign.facts
    words = [doing(facts)]
    if rate := number(facts, "tokens_per_s"):
        words.append(f"{rate:,.0f} tokens/s")
    if each := number(facts, "unit_s"):
        words.append(pace(each, str(facts.get("unit", "step"))))
    left = seconds_left(facts)
    if left is not None:
        words.append(f"{duration(left)} left")
    if job.sign.silent_s >= SILENT_S:
        words.append(f"no sign for {job.sign.silent_s / 60:.0f} min")
    if job.sign.alive is None:
        words.append(f"on {facts.get('host', 'an unknown machine')}")
    return f"{job.rule} {job.name}: {', '.join(words)}"
