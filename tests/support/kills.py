"""Kills of a study at work, and what must be equal between a study that was killed and one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import psutil

DEADLINE_S = 300
"""Until the moment of a kill must have come, and until a killed process must be gone."""
SAID = "killed.log"
"""In the working folder: what the last study that was killed said."""
# what a clock, a meter or the way there decides, and not the run
OF_THE_WAY = {
    "wall_s",
    "load_s",
    "timing",
    "memory",
    "rank_host_peak_bytes",
    "rank_device_allocated_peak_bytes",
    "gpu",
    "gpu_why",
    "notes",
    "provenance",
    "step_s",
    "processor_s",
    "waited_s",
    "energy_j",
    "seal",
    "files_sha256",  # of logs with times; the files are compared themselves
}


class Pipeline(Protocol):
    """A working folder and the command that is run in it, again and again."""

    folder: Path

    @property
    def command(self) -> list[str]: ...


Who = Literal["job", "snakemake", "all"]


def _heeds_ctrl_c() -> None:
    """As in a terminal: what a shell starts in the background ignores SIGINT, and so does all that is started below."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class Kill:
    """One signal, sent some time after a file has come."""

    when: str
    """Pattern of the file, below the working folder; it counts if it is newer than the start of the study."""
    number: signal.Signals
    who: Who
    """Whether one job gets it, Snakemake alone, or every process of the study."""
    later_s: float = 0.0
    """Seconds between the file and the signal."""

    def carry_out(self, study: Pipeline) -> float | None:
        """Start the study, send the signal at its moment, and wait for Snakemake to end.

        Returns:
            Seconds between the signal and the end; None where the study ended before its moment.
        """
        started = time.time()
        process = subprocess.Popen(
            study.command, cwd=study.folder, stdout=(study.folder / SAID).open("w"), stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=_heeds_ctrl_c,
        )  # fmt: skip
        deadline = time.monotonic() + DEADLINE_S
        while not self._has_come(study.folder, started):
            if process.poll() is not None:
                return None
            assert time.monotonic() < deadline, f"{self}: no {self.when}"
            time.sleep(0.005)
        time.sleep(self.later_s)
        sent = time.monotonic()
        if not self._send(process):
            process.wait(DEADLINE_S)
            return None
        process.wait(DEADLINE_S)
        return time.monotonic() - sent

    def _has_come(self, folder: Path, started: float) -> bool:
        try:
            return any(path.stat().st_mtime >= started for path in folder.glob(self.when))
        except FileNotFoundError:  # a temporary one went while the folder was read: look again
            return False

    def _send(self, process: subprocess.Popen[bytes]) -> bool:
        """Whether there was somebody to send it to; the next job is waited for."""
        while process.poll() is None:
            if self.who == "all":
                os.killpg(process.pid, self.number)
                return True
            if self.who == "snakemake":
                os.kill(process.pid, self.number)
                return True
            with suppress(psutil.NoSuchProcess):  # it ended while it was looked at
                started = psutil.Process(process.pid).children(recursive=True)
                # the process of a job itself: not its shell, and nothing that it started
                jobs = [one for one in started if "harness" in one.cmdline()]
                if jobs:
                    jobs[0].send_signal(self.number)
                    return True
            time.sleep(0.005)
        return False


KILLS = (
    Kill("results/logs/pretrain/*.log", signal.SIGKILL, "snakemake"),
    Kill("results/state/*/lr0.001-seed100/step*.json", signal.SIGKILL, "all"),
    Kill("results/state/*/lr0.003-seed100/step*.json", signal.SIGTERM, "snakemake"),
    Kill("results/state/*/step*.json", signal.SIGKILL, "all"),
    Kill("results/logs/evaluate/*.log", signal.SIGINT, "all"),
    Kill("results/micro/runs.parquet", signal.SIGKILL, "snakemake"),
)


def differences(straight: Path, killed: Path) -> list[str]:
    """What differs of the runs, searches and scores that both results folders should have alike."""
    found = []
    for path in sorted(killed.rglob("*")):
        name = path.relative_to(killed)
        if name.parts[0] not in {"runs", "searches", "probes"} or not path.is_file():
            continue
        if not (straight / name).is_file():
            found.append(f"{name}: only in the killed study")
        elif _content(path) != _content(straight / name):
            found.append(str(name))
    missing = [run.name for run in (killed / "runs").iterdir() if not list(run.glob("eval/*.json"))]
    return found + [f"{name}: never scored" for name in missing]


def _content(path: Path) -> Any:
    if path.suffix == ".json":
        return _without_the_way(json.loads(path.read_text(encoding="utf-8")))
    if path.suffix == ".jsonl":
        return [_without_the_way(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    return path.read_bytes()


def _without_the_way(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_the_way(inner) for key, inner in value.items() if key not in OF_THE_WAY}
    return [_without_the_way(inner) for inner in value] if isinstance(value, list) else value
