"""Scripts whose processes are the ranks of one group: how a test runs one, and how one ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path


def run_script(script: str, folder: Path, *, python_path: str, deadline_s: float) -> None:
    """Run a script of this folder, which writes what its ranks found to `folder`; it must not fail."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": python_path}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    command = [sys.executable, str(Path(__file__).with_name(script)), str(folder)]
    with (folder / "log").open("wb") as log:
        # a session of its own, so that no rank outlives a run that is given up
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        try:
            failed = process.wait(timeout=deadline_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
    assert not failed, (folder / "log").read_text()[-8000:]


def exit_code(ranks: Sequence[BaseProcess]) -> int:
    """Start all ranks and wait for them; not 0 where one of them failed."""
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return max(abs(process.exitcode or 0) for process in ranks)
