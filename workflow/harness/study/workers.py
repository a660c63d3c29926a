"""Whether a study's jobs find a server of warm workers, and how they are started: see `harness.workers`."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from harness.study.plan import Plan
from harness.workers.client import WORKERS

ALIKE = (("pretrain", "probe", "search", "train"), ("evaluate",), ("collect", "tables", "figures", "page"))
"""Stages that import torch or pandas, those together that import the same modules in the same environment."""
CLIENT = Path(__file__).parents[1] / "workers" / "client.py"


def command(*, warm: bool) -> str:
    """The beginning of a job's shell command: all but the stage and its arguments.

    Args:
        warm: ask for a worker; without a server, and on a machine that has none, the job starts as if it were False.
    """
    words = [sys.executable, *(["-I", "-S", str(CLIENT)] if warm else []), "-m", "harness"]
    return shlex.join(words)


def start(plan: Plan, stages: Iterable[str], folder: Path) -> dict[str, str]:
    """Start servers for as long as this process lives, for those of the stages that may use them.

    Jobs on a GPU may not: CUDA belongs to one process, and they take longer than imports. Nor jobs of several threads:
    libraries start these while they are imported, and a fork loses them.

    Args:
        plan: of the study.
        stages: of the jobs to come.
        folder: of the sockets, relative to the folder in which jobs work: a socket's path has to be short.

    Returns:
        What jobs are to find in their environment.
    """
    devices = {run.training.recipe.device for run in plan.runs.values()} | {p.device for p in plan.probes.values()}
    if not hasattr(os, "pidfd_open") or devices != {"cpu"} or plan.study.runtime.threads > 1:
        return {}
    coming = set(stages)
    for group in ALIKE:
        if wanted := [stage for stage in group if stage in coming]:
            server = subprocess.Popen(
                [sys.executable, "-m", "harness.workers.server", str(folder), *wanted],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            )  # fmt: skip
            # until it listens and has gone to the background; its stdin ends with this process, however that ends
            server.wait()
            _SERVERS.append(server)
    return {WORKERS: str(folder)}


_SERVERS: list[subprocess.Popen[bytes]] = []
