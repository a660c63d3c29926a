"""What the Snakefile adds for processes that die, or work elsewhere: a lock that ends with its holder, SIGTERM for the
jobs, and the config that they all read.
"""

from __future__ import annotations

import hashlib
import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from harness.progress import say
from harness.records import atomic
from harness.records.locks import NoLocksError, holder, try_lock


@dataclass(frozen=True)
class Copy:
    """The text of a config file, and where it is kept for jobs that start later: the file itself may be edited."""

    text: str
    path: Path

    def write(self) -> None:
        """Write the file unless it is there; its name follows from the text."""
        if not self.path.exists():
            atomic.write_text(self.path, self.text)


def copy_of(config: Path, folder: Path) -> Copy:
    """The copy of a config that goes into `folder`."""
    text = config.read_text(encoding="utf-8")
    return Copy(text, folder / "studies" / f"{hashlib.sha256(text.encode()).hexdigest()[:8]}.yaml")


def take_folder(snakemake: Path) -> str | None:
    """Hold the working folder until this process ends, however; a line where another Snakemake has it.

    Snakemake's own lock stays when it is killed, so `profiles/default` switches it off.

    Args:
        snakemake: the folder `.snakemake`.
    """
    lock = snakemake / "study.lock"
    try:
        if try_lock(lock) is not None:  # the open descriptor is the lock
            return None
    except NoLocksError as error:
        say(f"{error}; until then nothing stops a second Snakemake in this folder: start one alone")
        return None
    found = holder(lock)
    who = found[1] if found else "it has just begun"
    return f"another Snakemake works in this folder: {who}; wait for it, or end it"


_told: list[int] = []


def told_to_end() -> bool:
    """Whether a SIGTERM came: then every second counts, and nothing more is begun."""
    return bool(_told)


def pass_on_sigterm() -> None:
    """From now on a SIGTERM of this process also reaches the jobs that it started, which save their state.

    Snakemake alone would wait for them to finish. The innermost processes are told: a shell between would end at once
    and leave its job alone.
    """
    usual: Any = signal.getsignal(signal.SIGTERM)

    def both(number: int, frame: FrameType | None) -> None:
        _told.append(number)
        for process in psutil.Process().children(recursive=True):
            try:
                if not process.children():
                    process.terminate()
            except psutil.NoSuchProcess:
                continue
        if callable(usual):
            usual(number, frame)

    signal.signal(signal.SIGTERM, both)
