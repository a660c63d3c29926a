"""Interleaved timing, ratios with their spread, and how both are written down."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

GIB = 2**30


def interleaved(contenders: Mapping[str, Callable[[], Any]], *, warmup: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of one call of every contender in every round, by contender.

    Every round calls each contender once, every other round in the reverse order, so that a machine that grows slower
    or faster does so for all alike. The first `warmup` rounds are not recorded.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(warmup + rounds):
        for name in list(contenders)[:: -1 if number % 2 else 1]:
            started = time.perf_counter()
            contenders[name]()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def ratios(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """Round by round, `one` divided by `other`: neighbours in time, so a busy machine slows both."""
    return [a / b for a, b in zip(one, other, strict=True)]


def summary(values: Sequence[float], unit: str = "") -> dict[str, float]:
    """Median, quartiles, 95th percentile, extremes and number of `values`; `unit` ends the keys (`_s`, say)."""
    # with one value there is nothing between
    twentieths = statistics.quantiles(values, n=20, method="inclusive") if len(values) > 1 else [values[0]] * 19
    found = {
        "least": min(values),
        "low_quartile": twentieths[4],
        "median": twentieths[9],
        "high_quartile": twentieths[14],
        "p95": twentieths[18],
        "most": max(values),
    }
    return {**{f"{name}{unit}": value for name, value in found.items()}, "count": len(values)}


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """`median (low quartile to high quartile)`."""
    of = summary(values)
    return f"{of['median']:{form}} ({of['low_quartile']:{form}} to {of['high_quartile']:{form}})"


def keep_freed_memory() -> bool:
    """Let the C library keep memory that is freed, from here on; False where it cannot be told to (it is not glibc).

    glibc gives a freed temporary of some MiB back to the system or keeps it, by what else happened to be allocated.
    Where it gives it back, every page of the next one is faulted in anew: the same step of torch's AdamW then takes
    twice as long, or not, from one process to the next.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    # malloc.h: M_MMAP_THRESHOLD is -3, at most 32 MiB; M_TRIM_THRESHOLD is -1
    return bool(mallopt(-3, 32 * 2**20)) and bool(mallopt(-1, 2**30))


def provenance(device: torch.device) -> dict[str, Any]:
    """Where, when and with what the figures were measured."""
    cuda = device.type == "cuda"
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "load_average_1min": os.getloadavg()[0],
        "allocator_conf": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the checkout that this file is in, with `-dirty` where it has been changed; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
