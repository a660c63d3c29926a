"""Starts the processes of one run by torch's own launcher (torchrun), on this machine, and waits for them."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from harness.progress import say

SHUTDOWN_S = 120
"""Time to finish the step in progress and save, for processes that were told to end; then they are killed."""


def launch(arguments: Sequence[str], *, processes: int) -> int:
    """Run `python <arguments>` as every rank; what any of them says on stderr is said here, with its rank before it.

    If one fails, the others are ended. SIGTERM and Ctrl-C are passed on to all.

    Returns:
        0, or the exit code of the rank that failed first.
    """
    with tempfile.TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id="train",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            shutdown_timeout=SHUTDOWN_S,
            logs_specs=DefaultLogsSpecs(log_dir=logs, tee=Std.ERR),
            log_line_prefix_template="[rank ${rank}] ",
        )
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            say(f"rank {rank} of {processes} ended first, with exit code {failure.exitcode}")
            return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
        except SignalException as error:
            return 128 + error.sigval
    return 0
