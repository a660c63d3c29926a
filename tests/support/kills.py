"""Kills of a study at work, and what must be equal between a study that was killed and one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

DEADLINE_S = 300
"""Until the moment of a kill must have come, and until a killed process must be gone."""
# what a clock, a meter or the way there decides, and not the run
OF_THE_WAY = {
    "wall_s",
    "load_s",
    "timing",
    "memory",
    "gpu",
    "gpu_why",
    "notes",
    "provenance",
    "step_s",
    "processor_s",
    "waited_s",
}


class Pipeline(Protocol):
    """A working folder and the command that is run in it, again and again."""

    folder: Path

    @property
    def command(self) -> list[str]: ...


@dataclass(frozen=True)
class Kill:
    """One signal, sent as soon as a file is there."""

    when: str
    """Pattern of the file, below results/."""
    number: signal.Signals
    alone: bool
    """Whether Snakemake alone gets it, or every process of the study."""

    def carry_out(self, study: Pipeline) -> float:
        """Start the study, send the signal at its moment, and wait for Snakemake to end.

        Returns:
            Seconds between the signal and the end.
        """
        process = subprocess.Popen(
            study.command, cwd=study.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + DEADLINE_S
        while not any((study.folder / "results").glob(self.when)):
            assert process.poll() is None, f"{self}: the study ended before {self.when} was there"
            assert time.monotonic() < deadline, f"{self}: no {self.when}"
            time.sleep(0.005)
        sent = time.monotonic()
        (os.kill if self.alone else os.killpg)(process.pid, self.number)
        process.wait(DEADLINE_S)
        return time.monotonic() - sent


KILLS = (
    Kill("logs/pretrain/*.log", signal.SIGKILL, alone=True),
    Kill("state/*/lr0.001-seed100/step*.json", signal.SIGKILL, alone=False),
    Kill("state/*/lr0.003-seed100/step*.json", signal.SIGTERM, alone=True),
    Kill("state/*/step*.json", signal.SIGKILL, alone=False),
    Kill("logs/evaluate/*.log", signal.SIGINT, alone=False),
    Kill("micro/runs.parquet", signal.SIGKILL, alone=True),
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
