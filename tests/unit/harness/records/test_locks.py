"""Of two processes that do one job the second waits, and what a dead process held is free."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from harness.records.atomic import write_text
from harness.records.locks import NoLocksError, holder, one_at_a_time, remove_left, try_lock
from harness.study.supervision import take_folder

HOLD = """
import sys, time
from pathlib import Path
from harness.records.locks import one_at_a_time
output = Path(sys.argv[1])
with one_at_a_time(output, poll_s=0.05) as to_do:
    print("holds" if to_do else "nothing to do", flush=True)
    sys.stdin.readline()
    if to_do and len(sys.argv) > 2:
        output.write_text("{}")
"""


def holding(output: Path, *more: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output), *more], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    return process


def let_go(process: subprocess.Popen[str]) -> None:
    process.communicate("\n", timeout=20)


@pytest.mark.parametrize("writes", [True, False])
def test_the_second_waits_and_does_only_what_the_first_has_not_done(
    *, writes: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "train.json"
    first = holding(output, *(["writes"] if writes else []))
    threading.Timer(0.3, let_go, [first]).start()
    with one_at_a_time(output, poll_s=0.05) as to_do:
        assert to_do is not writes
    said = capsys.readouterr().err
    assert f"{output}: process {first.pid} since " in said
    assert "the other process ended after " in said
    assert not list(tmp_path.glob(".*.lock")), "nothing is left behind"


def test_what_a_killed_process_held_is_free_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "train.json"
    first = holding(output)
    assert list(tmp_path.glob(".*.lock"))
    first.send_signal(signal.SIGKILL)
    first.wait()
    with one_at_a_time(output) as to_do:
        assert to_do
    assert capsys.readouterr().err == ""


def test_the_file_of_a_job_that_was_killed_behind_its_output_goes(tmp_path: Path) -> None:
    """Where the output is not there the job is done again, and takes the file; where somebody holds it, it stays."""
    done, undone, held = (tmp_path / name for name in ("done.json", "undone.json", "held.json"))
    locks = {output: output.with_name(f".{output.name}.lock") for output in (done, undone, held)}
    for output, lock in locks.items():
        lock.write_text("{}", encoding="utf-8")
        if output is not undone:
            output.write_text("{}", encoding="utf-8")
    descriptor = try_lock(locks[held])
    assert descriptor is not None
    for output in locks:
        remove_left(output)
    os.close(descriptor)
    assert [output for output, lock in locks.items() if lock.exists()] == [undone, held]


def test_an_output_that_was_there_before_is_made_again(tmp_path: Path) -> None:
    output = tmp_path / "train.json"
    output.write_text("{}")
    with one_at_a_time(output) as to_do:
        assert to_do


def test_without_a_folder_there_is_no_lock(tmp_path: Path) -> None:
    with one_at_a_time(tmp_path / "none" / "train.json") as to_do:
        assert to_do
    assert not (tmp_path / "none").exists()


def test_a_lock_says_who_holds_it_and_is_no_childs(tmp_path: Path) -> None:
    path = tmp_path / "study.lock"
    lock = try_lock(path)
    assert lock is not None
    found = holder(path)
    assert found is not None
    assert found[0] == os.getpid()
    assert try_lock(path) is None
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    os.close(lock)
    try:
        assert try_lock(path) is not None
    finally:
        child.kill()
        child.wait()


def test_many_take_turns_though_the_file_comes_and_goes(tmp_path: Path) -> None:
    output, inside, most = tmp_path / "x.json", [0], [0]

    def turn() -> None:
        for _ in range(20):
            with one_at_a_time(output, poll_s=0.001):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.0005)
                inside[0] -= 1

    threads = [threading.Thread(target=turn) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_on_a_file_system_without_locks_work_goes_on_and_the_study_says_so(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(NoLocksError, match="this file system has no locks"):
        try_lock(tmp_path / "one.lock")
    with one_at_a_time(tmp_path / "train.json") as to_do:
        assert to_do
        write_text(tmp_path / "train.json", "{}")
    assert take_folder(tmp_path) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}: this file system has no locks (flock: ")
    assert "nothing stops a second Snakemake" in line
    assert [file.name for file in tmp_path.iterdir()] == ["train.json"]


def test_another_failure_of_a_lock_is_not_taken_for_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="broken"), one_at_a_time(tmp_path / "train.json"):
        pass
