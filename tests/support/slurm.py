"""A stand-in for SLURM: its commands run jobs as processes of this machine, two at a time.

`install` puts one link a command into a folder that goes to the front of PATH; every link is this program, and the name
by which it is called says what it does. It knows what the executor plugin and docs/cluster.md ask for, and no more.
What a job's steps leave behind when the batch script ends is killed, as SLURM does.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

COMMANDS = ("sbatch", "srun", "sacct", "sacctmgr", "squeue", "scancel", "scontrol", "sinfo", "sshare")
FOLDER = "STAND_IN_SLURM"
"""Environment variable: folder of the queue's state."""
REFUSING = "STAND_IN_SLURM_REFUSES"
"""Environment variable: where it is set, sbatch notes each job and refuses it."""
AT_ONCE = 2
GRACE_S = 60.0
"""Between the SIGTERM and the SIGKILL of a preempted or cancelled job."""
LONG = {"-D": "workdir", "-t": "time", "-p": "partition", "-A": "account", "-C": "constraint"}


def install(folder: Path, *, refusing: bool = False) -> dict[str, str]:
    """Make the commands and an empty queue; returns the environment in which they are found."""
    commands, queue = folder / "bin", folder / "queue"
    commands.mkdir(parents=True)
    queue.mkdir()
    for name in COMMANDS:
        script = commands / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).resolve()}" {name} "$@"\n')
        script.chmod(0o755)
    environment = os.environ | {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", FOLDER: str(queue)}
    return environment | {REFUSING: "yes"} if refusing else environment


class Job:
    """One submitted job; its facts are a JSON file, so that every command sees them."""

    def __init__(self, queue: Path, number: int) -> None:
        self.queue, self.number = queue, number
        self.file = queue / f"{number}.json"

    @property
    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.file.read_text())
        return found

    def note(self, **facts: Any) -> None:
        with _lock(self.queue / "lock"):
            temporary = self.file.with_suffix(".new")
            temporary.write_text(json.dumps((self.facts if self.file.exists() else {}) | facts))
            temporary.replace(self.file)

    @property
    def options(self) -> dict[str, str]:
        return options_of(self.facts["words"])

    def end(self, *, preempted: bool) -> None:
        """SIGTERM for every process of a running job, and SIGKILL after the grace."""
        self.note(told="PREEMPTED" if preempted else "CANCELLED")
        if self.facts["state"] == "RUNNING":
            _signal_all(self.facts["pid"], signal.SIGTERM)


def jobs(queue: Path) -> list[Job]:
    """All jobs, in the order of their submission."""
    return [Job(queue, number) for number in sorted(int(file.stem) for file in queue.glob("*.json"))]


def options_of(words: list[str]) -> dict[str, str]:
    """Options of an sbatch line by their long names; a flag's value is empty."""
    found, left = {}, list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not equals and left and not left[0].startswith("-"):
            value = left.pop(0)
        found[LONG.get(word, name)] = value
    return found


# ------------------------------------------------------------------ the commands


def sbatch(queue: Path, words: list[str]) -> int:
    with _lock(queue / "numbers"):
        number = 1 + max((job.number for job in jobs(queue)), default=0)
        job = Job(queue, number)
        job.note(words=words, state="PENDING", starts=0, told=None, pid=None)
    if os.environ.get(REFUSING):
        print("sbatch: error: this queue refuses all jobs", file=sys.stderr)
        return 1
    subprocess.Popen(
        [sys.executable, __file__, "run", str(number)], start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=(queue / f"{number}.err").open("w"),
    )  # fmt: skip
    print(number)
    return 0


def run(queue: Path, words: list[str]) -> int:
    """A job's life, in a process of its own."""
    job = Job(queue, int(words[0]))
    while True:
        with _slot(queue):
            if job.facts["told"] == "CANCELLED":
                job.note(state="CANCELLED")
                return 0
            code = _start(job)
        told = job.facts["told"]
        if told == "PREEMPTED" and "requeue" in job.options:
            job.note(state="PENDING", told=None, pid=None)
            continue
        job.note(state=told or ("FAILED" if code else "COMPLETED"), pid=None)
        return 0


def _start(job: Job) -> int:
    options = job.options
    script = job.queue / f"{job.number}.sh"
    script.write_text(f"#!/bin/sh\n{options['wrap']}\n")
    output = Path(options["output"].replace("%j", str(job.number)))
    environment = os.environ | {"SLURM_JOB_ID": str(job.number)}
    with output.open("a" if options.get("open-mode") == "append" else "w") as file:
        process = subprocess.Popen(
            ["/bin/sh", str(script)], cwd=options["workdir"], env=environment, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        job.note(state="RUNNING", pid=process.pid, starts=job.facts["starts"] + 1)
        family: list[psutil.Process] = []
        killed_at = None
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                family = psutil.Process(process.pid).children(recursive=True) or family
            if job.facts["told"] and killed_at is None:
                killed_at = time.monotonic() + GRACE_S
            if killed_at is not None and time.monotonic() > killed_at:
                _signal_all(process.pid, signal.SIGKILL)
            time.sleep(0.1)
    for left in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.kill()
    return process.returncode


def srun(queue: Path, words: list[str]) -> int:
    command = list(words)
    while command[0].startswith("-"):
        command.pop(0)
    os.execvp(command[0], command)


def scancel(queue: Path, words: list[str]) -> int:
    for word in words:
        Job(queue, int(word)).end(preempted=False)
    return 0


def sacct(queue: Path, words: list[str]) -> int:
    name = options_of(words).get("name")
    if name is not None:
        for job in jobs(queue):
            if job.options["job-name"] == name:
                print(f"{job.number}|{job.facts['state']}")
    return 0


def squeue(queue: Path, words: list[str]) -> int:
    asked = options_of(words)
    for job in jobs(queue):
        facts, options = job.facts, job.options
        if ("states" in asked or facts["state"] in {"PENDING", "RUNNING"}) and asked.get(
            "name", options["job-name"]
        ) == (options["job-name"]):
            values = {"%i": str(job.number), "%T": facts["state"], "%k": options["comment"]}
            line = asked.get("format", "%i %T %k")
            for letter, value in values.items():
                line = line.replace(letter, value)
            print(line)
    return 0


def scontrol(queue: Path, words: list[str]) -> int:
    if words[:2] == ["show", "config"]:
        print("MinJobAge               = 300 sec\nMaxArraySize            = 1001")
    elif words[0] == "requeue":
        Job(queue, int(words[1])).end(preempted=True)
    return 0


def sinfo(queue: Path, words: list[str]) -> int:
    print("PARTITION\nmain*")
    return 0


def sacctmgr(queue: Path, words: list[str]) -> int:
    return 0


sshare = sacctmgr


# ------------------------------------------------------------------ helpers


def _signal_all(pid: int, number: signal.Signals) -> None:
    """As a job's cgroup is signalled: the batch script and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        batch = psutil.Process(pid)
        for process in [*batch.children(recursive=True), batch]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _slot(queue: Path) -> Iterator[None]:
    while True:
        for number in range(AT_ONCE):
            with (queue / f"slot{number}").open("w") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                yield
                return
        time.sleep(0.2)


if __name__ == "__main__":
    command, *rest = sys.argv[1:]
    sys.exit(globals()[command](Path(os.environ[FOLDER]), rest))
