"""Forecasts of many cells, by several processes in parallel; each result is valid until its cell or code changes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from harness.efficiency.budget import Budget
from harness.efficiency.jobs import Job, Reply
from harness.efficiency.plan import Entry
from harness.efficiency.process import TimeIsUpError, Worker
from harness.efficiency.record import ForecastRecord
from harness.efficiency.store import Store, cell_sha256, packages
from harness.progress import duration, say
from harness.records.code import code_of, step_forecast
from harness.records.units import gib


def make_forecast(job: Job) -> Reply:
    """Make one forecast in this process; if a cell cannot be forecast, the reply says so."""
    from harness.errors import UserError
    from harness.forecasting.forecast import NoForecastError, forecast
    from harness.step.cell import configuration
    from harness.step.flops import attention_width, step_cost
    from harness.step.outcomes import CannotRunError

    started, code = time.perf_counter(), code_of(step_forecast(job.cell.module))
    facts: dict[str, Any] = {
        "cell": job.named,
        "packages": packages(),
        "asked_sha256": cell_sha256(job.cell),
        "code_sha256": code.sha256,
        "sources": dict(code.sources),
        "started_utc": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        found = forecast(job.cell)
    except CannotRunError as error:
        record = ForecastRecord(status="skipped", status_why=str(error), wall_s=_since(started), **facts)
    except (NoForecastError, UserError) as error:
        record = ForecastRecord(status="impossible", status_why=str(error), wall_s=_since(started), **facts)
    else:
        width = attention_width(configuration(job.cell.model))
        cost = step_cost(found.facts, found.promise, job.cell.settings, job.cell.shape, attention_width=width)
        record = ForecastRecord(
            status="ok",
            peak_bytes=found.peak_bytes,
            peak_phase=found.peak_phase,
            by_phase_bytes={str(phase): peak for phase, peak in found.by_phase.items()},
            by_kind_bytes={str(kind): nbytes for kind, nbytes in found.by_kind.items()},
            worst_draw=found.worst_draw,
            device_state_bytes=found.device_state_bytes,
            host_bytes=found.host_bytes,
            bound_tokens_per_s=cost.tokens_per_s,
            assumed=found.assumed,
            wall_s=_since(started),
            **facts,
        )
    return Reply(status="ok", forecast=record)


def fill_forecasts(
    entries: Sequence[Entry],
    store: Store,
    budget: Budget,
    *,
    cores: int,
    worker: Callable[[], Worker] | None = None,
    told: Callable[[str], None] = say,
) -> list[str]:
    """Make the forecasts that today's code has not made yet; returns one line for each that failed by a bug.

    Args:
        entries: the cells, most wanted first.
        store: where forecasts are kept.
        budget: no forecast begins when it is used up.
        cores: number of processes.
        worker: makes a handle for a process.
        told: is given a line for each forecast that is made, from any thread.
    """
    waiting = deque(entry for entry in entries if not store.has_fresh_forecast(entry))
    total = len(waiting)
    failed: list[str] = []
    lock = threading.Lock()

    def serve() -> None:
        with (worker or (lambda: Worker(None)))() as process:
            while True:
                with lock:
                    if not waiting or budget.left() <= 0:
                        return
                    entry = waiting.popleft()
                    number = total - len(waiting)
                try:
                    job = Job(do="forecast", named=entry.named, cell=entry.cell, device="cpu")
                    reply = process.run(job, min(budget.left(), 3600.0))
                except TimeIsUpError:
                    return
                with lock:
                    if reply.forecast is None:
                        failed.append(f"{entry.words}: {reply.why}")
                        told(f"[forecast {number}/{total}] {entry.words}: error: {reply.why}")
                        continue
                    store.keep(reply.forecast)
                told(f"[forecast {number}/{total}] {entry.words}: {_summary(reply.forecast)}")

    threads = [threading.Thread(target=serve) for _ in range(min(cores, total))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed


def _summary(record: ForecastRecord) -> str:
    if record.peak_bytes is None:
        return f"{record.status} ({record.status_why})"
    return f"{gib(record.peak_bytes)} GiB in {record.peak_phase}, {duration(record.wall_s)}"


def _since(started: float) -> float:
    return time.perf_counter() - started
