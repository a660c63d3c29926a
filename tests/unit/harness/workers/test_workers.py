"""A warm worker is what a fresh process is, to whoever starts it, tells it to end, kills it or looks at it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness.study.workers import CLIENT
from harness.workers.client import WORKERS
from house import ROOT

DEADLINE_S = 30.0
STAGE = "schema"
"""A stage that imports little."""
JOB = """
import json, os, random, resource, signal, subprocess, sys, threading, time
from pathlib import Path

def tell(**facts):
    with open("told.jsonl", "a") as file:
        file.write(json.dumps(facts) + "\\n")

def noted(number, frame):
    tell(signal=number)
    if "deaf" not in sys.argv:
        sys.exit(128 + number)

what = sys.argv[2]
if what == "look":
    tell(
        argv=sys.argv[1:], orig_argv=sys.orig_argv, folder=os.getcwd(), environment=dict(os.environ), path=sys.path,
        umask=os.umask(0o777), stdin=sys.stdin.read(), name=__name__, flags=list(sys.flags), out=sys.stdout.encoding,
        limits=resource.getrlimit(resource.RLIMIT_NOFILE), threads=len(os.listdir("/proc/self/task")),
        files=sorted(os.listdir("/proc/self/fd"))[:-1], nice=os.nice(0),
        signals={int(number): repr(signal.getsignal(number)) for number in sorted(signal.valid_signals())},
        blocked=sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
    )
    print("to stdout")
    print("to stderr", file=sys.stderr)
elif what == "draw":
    tell(drawn=random.random())
elif what == "end":
    tell(pid=os.getpid())
    code = int(sys.argv[3])
    sys.exit(code) if code >= 0 else os.kill(os.getpid(), -code)
elif what == "fail":
    raise RuntimeError("as it is")
elif what == "work":
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, noted)
    tell(pid=os.getpid(), parent=os.getppid())
    while not Path("enough").exists():
        time.sleep(0.01)
    tell(done=os.getpid())
"""


def until(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
    return found


class House:
    """A folder with a job that says what it sees, and perhaps a server."""

    def __init__(self, folder: Path, path: list[Path]) -> None:
        self.folder = folder
        (folder / "told_job.py").write_text(JOB)
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, [folder, *path])),
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            WORKERS: "doors",
        }
        self.owner: Any = None
        self.started: list[subprocess.Popen[str]] = []

    def serve(self) -> None:
        command = [sys.executable, "-m", "harness.workers.server", "doors", STAGE]
        self.owner = subprocess.Popen(command, cwd=self.folder, stdin=subprocess.PIPE, env=self.environment)
        assert self.owner.wait() == 0

    def close(self) -> None:
        """End all that a failed test may have left at work."""
        for client in self.started:
            client.kill()
            client.wait()
        if self.owner is not None:
            self.owner.stdin.close()

    def command(self, *words: str, warm: bool = True) -> list[str]:
        client = ["-I", "-S", str(CLIENT)] if warm else []
        return [sys.executable, *client, "-m", "told_job", STAGE, *words]

    def begin(self, *words: str, warm: bool = True, **options: Any) -> subprocess.Popen[str]:
        given = {"cwd": self.folder, "env": self.environment, "text": True, **options}
        self.started.append(subprocess.Popen(self.command(*words, warm=warm), **given))
        return self.started[-1]

    def run(self, *words: str, warm: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        given = {"cwd": self.folder, "env": self.environment, "text": True, "capture_output": True, **options}
        return subprocess.run(self.command(*words, warm=warm), timeout=DEADLINE_S, **given)

    def told(self) -> list[dict[str, Any]]:
        file = self.folder / "told.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def begun(self, number: int = 1) -> list[psutil.Process]:
        """The processes of this many jobs that have begun to work."""
        until(lambda: len(self.told()) >= number, "no job")
        return [psutil.Process(told["pid"]) for told in self.told()]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path, [ROOT / "workflow", ROOT])
    made.serve()
    yield made
    made.close()


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_a_worker_sees_what_a_fresh_process_sees(house: House) -> None:
    (house.folder / "elsewhere").mkdir()
    house.environment[WORKERS] = str(house.folder / "doors")
    neighbour = house.begin("work")
    house.begun()
    for warm in (False, True):
        words = ["look", "two words", "\udcff"]
        done = house.run(*words, warm=warm, input="given", umask=0o027, cwd=house.folder / "elsewhere")
        assert (done.returncode, done.stdout, done.stderr) == (0, "to stdout\n", "to stderr\n")
    seen = [json.loads(line) for line in (house.folder / "elsewhere" / "told.jsonl").read_text().splitlines()]
    fresh, worker = seen
    # a fresh process begins with the folder in which it was started; jobs of a study all start where Snakemake did
    assert fresh["path"].pop(0) == str(house.folder / "elsewhere")
    assert worker["path"].pop(0) == str(house.folder)
    assert worker == fresh
    (house.folder / "enough").touch()
    assert neighbour.wait(DEADLINE_S) == 0


def test_a_worker_ignores_what_its_client_was_born_to_ignore(house: House) -> None:
    ignore = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    for warm in (False, True):
        house.run("look", warm=warm, preexec_fn=ignore, stdin=subprocess.DEVNULL)
    fresh, worker = house.told()
    assert worker["signals"] == fresh["signals"]
    assert "SIG_IGN" in fresh["signals"][str(int(signal.SIGINT))]


def test_workers_draw_different_random_numbers(house: House) -> None:
    for _ in range(2):
        house.run("draw")
    assert house.told()[0] != house.told()[1]


@pytest.mark.parametrize("code", [0, 3, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGSEGV])
def test_a_job_ends_as_its_worker_ends_and_the_next_one_finds_a_worker(house: House, code: int) -> None:
    assert house.run("end", str(code)).returncode == code
    assert house.run("end", "0").returncode == 0
    jobs = [told["pid"] for told in house.told()]
    assert len(set(jobs)) == 2


def test_a_failure_is_told_with_its_traceback(house: House) -> None:
    done = house.run("fail")
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: as it is\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("group", [False, True])
def test_a_signal_reaches_the_worker_once(house: House, number: signal.Signals, group: bool) -> None:
    """Also where all processes of a group get it, as from a terminal."""
    client = house.begin("work", "deaf", start_new_session=True)
    (worker,) = house.begun()
    os.killpg(client.pid, number) if group else client.send_signal(number)
    until(lambda: len(house.told()) == 2, "no signal")
    (house.folder / "enough").touch()
    assert client.wait(DEADLINE_S) == 0
    assert [told["signal"] for told in house.told() if "signal" in told] == [number]
    assert gone(worker)


def test_a_job_that_saves_when_it_is_told_to_end_gives_its_own_exit_code(house: House) -> None:
    client = house.begin("work")
    house.begun()
    client.terminate()
    assert client.wait(DEADLINE_S) == 128 + signal.SIGTERM


def test_a_worker_dies_with_its_client_and_leaves_the_others_alone(house: House) -> None:
    first = house.begin("work")
    house.begun()
    second = house.begin("work")
    one, other = house.begun(2)
    first.kill()
    until(lambda: gone(one), "the worker outlived its client")
    assert not gone(other)
    (house.folder / "enough").touch()
    assert second.wait(DEADLINE_S) == 0
    first.wait()


def test_a_killed_worker_takes_no_other_one_along(house: House) -> None:
    clients = [house.begin("work")]
    house.begun()
    clients.append(house.begin("work"))
    one, _ = house.begun(2)
    # also where it kills its own group
    os.killpg(os.getpgid(one.pid), signal.SIGKILL)
    assert clients[0].wait(DEADLINE_S) == -signal.SIGKILL
    (house.folder / "enough").touch()
    assert clients[1].wait(DEADLINE_S) == 0


def test_workers_die_with_their_server_and_the_jobs_are_begun_anew(house: House) -> None:
    client = house.begin("work")
    (worker,) = house.begun()
    psutil.Process(house.told()[0]["parent"]).kill()
    until(lambda: gone(worker), "the worker outlived its server")
    again = until(lambda: house.told()[1:], "the job was not done again")[0]["pid"]
    assert again == client.pid
    (house.folder / "enough").touch()
    assert client.wait(DEADLINE_S) == 0
    assert house.told()[-1] == {"done": client.pid}


def test_a_stopped_client_stops_its_worker(house: House) -> None:
    client = house.begin("work", start_new_session=True)
    (worker,) = house.begun()
    client.send_signal(signal.SIGTSTP)
    until(lambda: worker.status() == psutil.STATUS_STOPPED, "it works on")
    until(lambda: psutil.Process(client.pid).status() == psutil.STATUS_STOPPED, "the client goes on")
    client.send_signal(signal.SIGCONT)
    (house.folder / "enough").touch()
    assert client.wait(DEADLINE_S) == 0


def test_a_server_ends_with_its_owner_when_its_jobs_are_done(house: House) -> None:
    client = house.begin("work")
    (worker,) = house.begun()
    server = psutil.Process(house.told()[0]["parent"])
    house.owner.stdin.close()
    # it takes no more jobs, and keeps the one that it has
    assert house.run("end", "0").returncode == 0
    assert not gone(worker)
    (house.folder / "enough").touch()
    assert client.wait(DEADLINE_S) == 0
    until(lambda: gone(server), "the server stays")


def test_a_client_that_says_nothing_does_no_harm(house: House) -> None:
    with socket.socket(socket.AF_UNIX) as mute:
        mute.connect(str(house.folder / "doors" / STAGE))
    house.run("end", "0")
    client = house.begin("end", "0")
    assert client.wait(DEADLINE_S) == 0
    assert house.told()[-1]["pid"] != client.pid


def was_fresh(house: House, **options: Any) -> bool:
    """Whether a job is done by the process that was started for it."""
    client = house.begin("end", "0", stdout=subprocess.PIPE, **options)
    # a pipe ends when nobody has it open any more
    assert client.communicate(timeout=DEADLINE_S) == ("", None)
    assert client.returncode == 0
    return bool(house.told()[-1]["pid"] == client.pid)


def test_without_a_server_a_job_is_done_all_the_same(tmp_path: Path) -> None:
    house = House(tmp_path, [ROOT / "workflow", ROOT])
    assert was_fresh(house)
    (tmp_path / "doors").mkdir()
    (tmp_path / "doors" / STAGE).touch()  # not a socket
    assert was_fresh(house)
    del house.environment[WORKERS]
    assert was_fresh(house)


def test_another_environment_gets_a_fresh_process(house: House) -> None:
    assert not was_fresh(house)
    assert not was_fresh(house, env={**house.environment, "SHLVL": "7"})
    assert was_fresh(house, env={**house.environment, "HF_HOME": "/elsewhere"})
    less = {name: value for name, value in house.environment.items() if name != "OMP_NUM_THREADS"}
    assert was_fresh(house, env=less)


def test_changed_code_gets_a_fresh_process(tmp_path: Path) -> None:
    copied = tmp_path / "code"
    for source, name in ((ROOT / "workflow" / "harness", "harness"), (ROOT / "grass", "grass")):
        shutil.copytree(source, copied / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "baselines", copied / "baselines", ignore=shutil.ignore_patterns("__pycache__"))
    house = House(tmp_path, [copied])
    house.serve()
    assert not was_fresh(house)
    (copied / "harness" / "errors.py").open("a").write("# changed\n")
    assert was_fresh(house)
    house.close()
