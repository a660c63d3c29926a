"""A measuring session: one block after another, each saved before the next begins, until the plan or the budget ends.

This process imports no torch: one worker process measures, others forecast.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from harness.efficiency.arithmetic import WANTED_ERROR, relative_error
from harness.efficiency.budget import Budget, Estimates
from harness.efficiency.forecasts import fill_forecasts
from harness.efficiency.jobs import Job
from harness.efficiency.plan import Entry, Group, Unit, cells, once_more, units
from harness.efficiency.process import TimeIsUpError, Worker
from harness.efficiency.record import CellRecord
from harness.efficiency.store import MeasureOptions, Store, is_done
from harness.measuring.gpu import lease_for
from harness.progress import say
from harness.records.units import gib

NO_TIME = "the budget was used up"


@dataclass
class Outcome:
    """Result of a session."""

    measured: int = 0
    """Number of blocks measured in this session."""
    kept: int = 0
    """Number of blocks that had been measured before, or cannot be measured."""
    missing: list[tuple[Unit, str]] = field(default_factory=list)
    """Blocks that were not measured, with the reasons."""
    errors: list[str] = field(default_factory=list)
    """One line for each cell that failed by a bug."""
    device: str | None = None

    def coverage(self, asked: MeasureOptions, budget: Budget, only: Sequence[str]) -> dict[str, Any]:
        """The session's plan, and the blocks of it that were not measured: for coverage.json."""
        return {
            "device": asked.device,
            "device_name": self.device,
            "budget_s": budget.seconds,
            "spent_s": round(budget.spent(), 1),
            "repeats": asked.repeats,
            "timed_steps": asked.timed_steps,
            "warmup_steps": asked.warmup_steps,
            "only": list(only),
            "blocks_measured": self.measured,
            "blocks_kept": self.kept,
            "not_measured": [
                {"cell": unit.entry.words, "block": unit.do, "repeat": unit.repeat, "why": why}
                for unit, why in self.missing
            ],
            "errors": self.errors,
        }

    def lines(self) -> Iterator[str]:
        """The blocks that were not measured, one line per group, and the errors."""
        missing: dict[tuple[str, str], list[str]] = {}
        for unit, why in self.missing:
            named = unit.entry.named
            group = f"{named.model}/{named.settings}/{named.shape}"
            missing.setdefault((group, why), []).append(named.label)
        for (group, why), labels in missing.items():
            yield f"not measured: {group}: {', '.join(dict.fromkeys(labels))} ({why})"
        if missing:
            yield "the same command again goes on where this one ended"
        for line in self.errors:
            yield f"error: {line}"


def run_session(groups: Sequence[Group], asked: MeasureOptions, store: Store, budget: Budget, *, cores: int) -> Outcome:
    """Lease the device and measure as much as the budget allows; then forecast the measured cells, if time is left.

    Raises:
        NoGpuError: the session is for a GPU, and none is available.
    """
    if budget.left() <= 0:
        return Outcome()
    with lease_for(asked.device), Worker(asked.device) as worker:
        outcome = measure_all(groups, asked, store, budget, worker)
    seen = [entry for entry in cells(groups) if store.current(entry, asked) is not None]
    outcome.errors += fill_forecasts(seen, store, budget, cores=cores)
    for entry in seen:
        store.predict(entry, asked)
    return outcome


def measure_all(
    groups: Sequence[Group],
    asked: MeasureOptions,
    store: Store,
    budget: Budget,
    worker: Worker,
    *,
    estimates: Estimates | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Measure those blocks of the plan that are not on disk yet and fit into the budget.

    Args:
        groups: the plan.
        asked: what to measure of each cell.
        store: where records are kept.
        budget: a block that may not fit is skipped in favour of later ones that do; a block that exceeds it is killed.
        worker: runs the blocks.
        estimates: from blocks done before.
        now: a monotonic clock.
    """
    outcome, estimates = Outcome(), estimates or Estimates()
    failed: set[str] = set()

    def unsure(entry: Entry) -> bool:
        record = store.current(entry, asked, worker.device)
        if record is None or record.status != "ok":
            return False
        error = relative_error([block.tokens_per_s for block in record.timing])
        return error is not None and error > WANTED_ERROR

    planned = list(units(groups, asked.repeats))
    if budget.allows(0.0) and not all(is_done(unit, store.current(unit.entry, asked)) for unit in planned):
        with suppress(TimeIsUpError):  # all blocks are then missing for lack of time
            worker.start(budget.left())  # only the worker knows the card; records of another card do not count
    for unit in chain(planned, once_more(groups, asked.repeats, unsure)):
        entry, further = unit.entry, unit.repeat >= asked.repeats
        record = store.current(entry, asked, worker.device)
        if entry.named.name in failed and not further:
            outcome.missing.append((unit, "an error in an earlier block of this cell"))
            continue
        if is_done(unit, record):
            outcome.kept += 1
            continue
        if not budget.allows(estimates.of(unit)):
            if not further:
                outcome.missing.append((unit, NO_TIME))
            continue
        began = now()
        try:
            reply = worker.run(job_of(unit, asked), budget.left())
        except TimeIsUpError:
            if not further:
                outcome.missing.append((unit, f"{NO_TIME} while it ran"))
            continue
        assert worker.device is not None
        outcome.device = worker.device.name
        record = store.add(unit, reply, asked, worker.device)
        estimates.add(unit, now() - began)
        outcome.measured += 1
        if reply.status == "error":
            failed.add(entry.named.name)
            outcome.errors.append(f"{entry.words}, {unit.do}: {reply.why}")
        say(f"[{budget.spent():.0f} s{_of(budget)}] {entry.words}, {block_words(unit, asked)}: {_said(unit, record)}")
    return outcome


def job_of(unit: Unit, asked: MeasureOptions) -> Job:
    """What a worker is asked for a block."""
    return Job(
        do=unit.do,
        named=unit.entry.named,
        cell=unit.entry.cell,
        device=asked.device,
        warmup_steps=asked.warmup_steps,
        timed_steps=asked.timed_steps,
        repeat=unit.repeat,
        repeats=asked.repeats,
    )


def _of(budget: Budget) -> str:
    return "" if budget.seconds is None else f" of {budget.seconds:.0f} s"


def block_words(unit: Unit, asked: MeasureOptions) -> str:
    """A block, for people."""
    if unit.do == "memory":
        return "memory"
    if unit.repeat >= asked.repeats:
        return f"timing {unit.repeat + 1}, since repeats differ"
    return f"timing {unit.repeat + 1} of {asked.repeats}"


def _said(unit: Unit, record: CellRecord) -> str:
    if record.status != "ok":
        return f"{record.status} ({record.status_why})"
    if unit.do == "timing":
        if not record.timing:
            return f"nothing ({record.timing_why})"
        block = record.timing[-1]
        on_cpu = ", of a CPU" if record.device.kind == "cpu" else ""
        return f"{block.tokens_per_s:,.0f} tokens/s{on_cpu}, reach {block.mean_reach:.2f}"
    if record.memory is None or record.memory.allocated_peak_bytes is None:
        why = record.memory_why if record.memory is None else record.memory.device_why
        return f"no device memory ({why})"
    said = f"{gib(record.memory.allocated_peak_bytes)} GiB in {record.memory.peak_phase}"
    if record.predicted is not None:
        said += f" (forecast {gib(record.predicted.allocated_peak_bytes)})"
    return said
