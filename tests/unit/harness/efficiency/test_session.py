"""A session over many blocks: crashes, time that runs out, and what a later session takes up. No torch is needed."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import efficiency_data as data
import pytest
from harness.efficiency import session as sessions
from harness.efficiency.budget import Budget
from harness.efficiency.forecasts import fill_forecasts
from harness.efficiency.plan import Group, plan
from harness.efficiency.process import Worker
from harness.efficiency.session import Outcome, measure_all
from harness.efficiency.spec import load_efficiency
from harness.efficiency.store import MeasureOptions, Store

ASKED = MeasureOptions(device="cpu", warmup_steps=5, timed_steps=10, repeats=2)


def groups(folder: Path) -> list[Group]:
    """lora, grass-decoder and its resident variant, then grass-decoder with more active layers: one group each."""
    return plan(load_efficiency(data.tiny_file(folder)), "cpu", ["tiny/*/lean/4x1024"])


def session(
    folder: Path, body: str = "pass", *, budget: Budget | None = None, asked: MeasureOptions = ASKED
) -> Outcome:
    with Worker("cpu", data.worker_command(folder, body)) as worker:
        return measure_all(groups(folder), asked, Store(folder), budget or Budget(None), worker)


def statuses(folder: Path) -> dict[str, str]:
    return {record.cell.label: record.status for record in Store(folder).records()}


def test_every_block_is_measured_once_and_kept(tmp_path: Path) -> None:
    first = session(tmp_path)
    assert (first.measured, first.kept, first.missing, first.errors) == (12, 0, [], [])
    made = {p: p.stat().st_mtime_ns for p in tmp_path.glob("records/*--cpu--*.json")}
    assert len(made) == 4
    second = session(tmp_path)
    assert (second.measured, second.kept) == (0, 12)
    assert made == {p: p.stat().st_mtime_ns for p in tmp_path.glob("records/*--cpu--*.json")}
    for record in Store(tmp_path).records():
        assert [block.repeat for block in record.timing] == [0, 1]
        assert (record.memory_why, record.timing_why) == (None, None)


UNEVEN = (
    "if job.cell.module == 'lora':\n"
    "        timing.timing.__dict__['tokens_per_s'] = {0: 900.0, 1: 1100.0}.get(job.repeat, 1000.0)"
)


def test_a_group_whose_repeats_differ_is_timed_again_until_the_mean_is_known_or_twice_over(tmp_path: Path) -> None:
    """900 and 1,100 tokens/s: after two more repeats of 1,000 the mean's standard error is 4 %, and patience ends."""
    outcome = session(tmp_path, UNEVEN)
    repeats = {record.cell.label: [b.repeat for b in record.timing] for record in Store(tmp_path).records()}
    # lora's neighbours in its group too, so that every repeat has a ratio; the other group is as it was
    assert repeats == {
        "lora": [0, 1, 2, 3],
        "grass-decoder": [0, 1, 2, 3],
        "grass-decoder+offload=resident": [0, 1, 2, 3],
        "grass-decoder+active_layers=4": [0, 1],
    }
    assert (outcome.measured, outcome.missing) == (12 + 6, [])
    assert session(tmp_path, UNEVEN).measured == 0


class ForThirteen(Budget):
    """Allows the start, the twelve planned blocks and nothing more."""

    asked = 0

    def allows(self, estimate_s: float) -> bool:
        self.asked += 1
        return self.asked <= 1 + 12


def test_what_a_budget_leaves_out_of_further_repeats_is_not_missing(tmp_path: Path) -> None:
    outcome = session(tmp_path, UNEVEN, budget=ForThirteen(None))
    assert (outcome.measured, outcome.missing) == (12, [])


def test_a_crash_is_an_error_row_and_the_others_still_run(tmp_path: Path) -> None:
    outcome = session(tmp_path, "job.cell.module == 'lora' and os.abort()")
    assert statuses(tmp_path) == {
        "lora": "error",
        "grass-decoder": "ok",
        "grass-decoder+offload=resident": "ok",
        "grass-decoder+active_layers=4": "ok",
    }
    assert len(outcome.errors) == 1
    assert "ended by signal SIGABRT" in outcome.errors[0]
    assert [data.said(unit) for unit, _ in outcome.missing] == ["lora timing0", "lora timing1"]
    # an error is no outcome: the next session tries again
    again = session(tmp_path)
    assert (again.measured, again.errors) == (3, [])
    assert set(statuses(tmp_path).values()) == {"ok"}


def test_an_exception_is_an_error_row_that_names_it(tmp_path: Path) -> None:
    outcome = session(tmp_path, "if job.cell.module == 'lora' and job.repeat: raise TypeError('no such thing')")
    assert statuses(tmp_path)["lora"] == "error"
    assert outcome.errors == ["tiny/lora/lean/4x1024, timing: TypeError: no such thing"]
    (failed,) = [record for record in Store(tmp_path).records() if record.status == "error"]
    assert (failed.memory is not None, len(failed.timing), failed.timing_why) == (
        True, 1, "error: TypeError: no such thing",
    )  # fmt: skip
    # what was measured before the error stays, and the block that failed is tried again
    assert session(tmp_path).measured == 1
    (again,) = [record for record in Store(tmp_path).records() if record.cell == failed.cell]
    assert (again.status, again.status_why, again.timing_why) == ("ok", None, None)
    assert again.memory == failed.memory
    assert again.timing[:1] == failed.timing
    assert [block.repeat for block in again.timing] == [0, 1]


def test_out_of_memory_and_skipped_stand_as_rows(tmp_path: Path) -> None:
    body = (
        "from harness.efficiency.record import OutOfMemory\n"
        "    if job.cell.module == 'lora': return Reply(status='skipped', why='needs the package peft')\n"
        "    if job.do == 'timing': return Reply(status='oom', why='in phase backward: no memory',"
        " clean=job.named.variant != 'offload=resident',"
        " oom=OutOfMemory(block='timing', phase='backward', requested_bytes=7))"
    )
    outcome = session(tmp_path, body)
    assert outcome.errors == []
    found = {record.cell.label: record for record in Store(tmp_path).records()}
    assert found["lora"].status == "skipped"
    assert found["lora"].timing_why == "skipped in the memory block"
    light = found["grass-decoder"]
    assert light.status == "oom"
    assert light.memory is not None
    assert light.oom is not None
    assert light.oom.requested_bytes == 7
    # one block each for lora, two for the others: a cell that ran out of memory is not tried again
    assert outcome.measured == 1 + 3 * 2
    assert session(tmp_path, body).measured == 0


def test_the_budget_ends_a_block_that_runs_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.efficiency.budget.REPORT_S", 0.0)
    monkeypatch.setattr("harness.efficiency.budget.FIRST_S", 0.1)
    outcome = session(tmp_path, "job.cell.module == 'grass' and time.sleep(600)", budget=Budget(4.0))
    assert statuses(tmp_path) == {"lora": "ok"}
    reasons = [why for _, why in outcome.missing]
    assert reasons[0] == "the budget was used up while it ran"
    assert set(reasons[1:]) == {sessions.NO_TIME}
    assert outcome.measured + len(outcome.missing) == 12


def test_without_time_nothing_is_started(tmp_path: Path) -> None:
    outcome = session(tmp_path, "raise SystemExit(3)", budget=Budget(0.0))
    assert (outcome.measured, len(outcome.missing), outcome.device) == (0, 12, None)


def test_a_worker_that_cannot_start_is_a_bad_program(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="the worker did not start: the worker process ended by exit code 3"),
        Worker("cpu", ["sh", "-c", "echo no driver >&2; exit 3"]) as worker,
    ):
        measure_all(groups(tmp_path), ASKED, Store(tmp_path), Budget(None), worker)


def test_a_worker_ends_with_its_parent(tmp_path: Path) -> None:
    """The parent is a process that starts a worker, says its number, and is killed."""
    program = tmp_path / "parent.py"
    program.write_text(
        "import sys, time\n"
        f"sys.path[:0] = {[p for p in __import__('sys').path if p]!r}\n"
        "from harness.efficiency.process import Worker\n"
        f"worker = Worker('cpu', {data.worker_command(tmp_path)!r})\n"
        "worker.start()\n"
        "print(worker._process.pid, flush=True)\n"
        "time.sleep(600)\n",
        encoding="utf-8",
    )
    import subprocess
    import sys
    import time

    parent = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 20
    while _alive(worker) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _alive(worker)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


# ---------------------------------------------------------------- forecasts on disk


def test_forecasts_are_made_once_and_again_when_the_cell_changes(tmp_path: Path) -> None:
    body = (
        "import efficiency_data as data; from harness.efficiency.plan import Entry\n"
        "    return Reply(status='ok', forecast=data.forecast_record(Entry(job.named, job.cell), 1.0))"
    )
    entries = [e for group in groups(tmp_path) for e in group.entries]
    store = Store(tmp_path)

    def fill() -> list[str]:
        return fill_forecasts(
            entries, store, Budget(None), cores=2, worker=lambda: Worker(None, data.worker_command(tmp_path, body))
        )

    assert fill() == []
    made = {p: p.stat().st_mtime_ns for p in tmp_path.glob("records/*--forecast--*.json")}
    assert len(made) == 4
    assert fill() == []
    assert made == {p: p.stat().st_mtime_ns for p in tmp_path.glob("records/*--forecast--*.json")}
    entries[0] = replace(entries[0], cell=entries[0].cell.with_options(rank=8))
    fill()
    assert made == {p: p.stat().st_mtime_ns for p in made}
    (new,) = set(tmp_path.glob("records/*--forecast--*.json")) - made.keys()
    assert new.name.startswith(f"{entries[0].named.name}--")


def test_a_forecast_that_crashes_is_told_and_the_others_are_made(tmp_path: Path) -> None:
    body = (
        "import efficiency_data as data; from harness.efficiency.plan import Entry\n"
        "    job.cell.module == 'lora' and os.abort()\n"
        "    return Reply(status='ok', forecast=data.forecast_record(Entry(job.named, job.cell), 1.0))"
    )
    entries = [e for group in groups(tmp_path) for e in group.entries]
    command = data.worker_command(tmp_path, body)
    failed = fill_forecasts(entries, Store(tmp_path), Budget(None), cores=1, worker=lambda: Worker(None, command))
    assert len(failed) == 1
    assert failed[0].startswith("tiny/lora/lean/4x1024: the worker process ended by signal SIGABRT")
    assert len(list(tmp_path.glob("records/*--forecast--*.json"))) == 3
