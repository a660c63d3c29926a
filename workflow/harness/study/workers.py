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

STAGES = ("pretrain", "probe", "search", "train", "evaluate", "collect", "tables", "figures", "page")
"""Those that import torch or pandas; the others start faster than a worker would matter."""
CLIENT = Path(__file__).parents[1] / "workers" / "client.py"


def command(*, warm: bool) -> str:
    """The beginning of a job's shell command: all but the stage and its arguments.

    Args:
        warm: ask for a worker; without a server, and on a machine that has none, the job starts as if it were False.
    """
    words = [sys.executable, *(["-I", "-S", str(CLIENT)] if warm else []), "-m", "harness"]
    return shlex.join(words)


def start(plan: Plan, stages: Iterable[str], socket: Path) -> dict[str, str]:
    """Start a server for as long as this process lives, if jobs of these stages may use one.

    Jobs on a GPU may not: CUDA belongs to one process, and they take longer than imports. Nor jobs of several threads:
    libraries start these while they are imported, and a fork loses them.

    Args:
        plan: of the study.
        stages: of the jobs to come.
        socket: where it listens, relative to the folder in which jobs work: such a path is short, as it has to be.

    Returns:
        What jobs are to find in their environment.
    """
    wanted = [stage for stage in STAGES if stage in set(stages)]
    devices = {run.training.recipe.device for run in plan.runs.values()} | {p.device for p in plan.probes.values()}
    if not wanted or not hasattr(os, "pidfd_open") or devices != {"cpu"} or plan.study.runtime.threads > 1:
        return {}
    server = subprocess.Popen(
        [sys.executable, "-m", "harness.workers.server", str(socket), *wanted],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    # it listens and has gone to the background; without a socket, as on some shared file systems, there is none
    if server.wait() != 0:
        return {}
    # until this process ends, however: then the server's stdin ends
    assert server.stdin is not None
    _OPEN.append(server.stdin)
    return {WORKERS: str(socket)}


_OPEN: list[object] = []
