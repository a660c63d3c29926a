"""What the Snakefile adds where processes die: a lock that ends with its holder, and SIGTERM for the jobs."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from harness.records.locks import holder, try_lock


def take_folder(snakemake: Path) -> str | None:
    """Hold the working folder until this process ends, however; a line where another Snakemake has it.

    Snakemake's own lock stays when it is killed, so `profiles/default` switches it off.

    Args:
        snakemake: the folder `.snakemake`.
    """
    lock = snakemake / "study.lock"
    if try_lock(lock) is not None:  # the open descriptor is the lock
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
