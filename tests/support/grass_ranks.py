"""The processes of `test_distributed.py`; a script: `python grass_ranks.py <folder>`.

Every scenario returns what its rank saw, which is saved as `<folder>/<scenario>-<rank>.pt`.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from grass_rank_collectives import averaged_gradients, averages, traffic
from grass_rank_refusals import disagreements, toggled_under_ddp, wrapped
from grass_rank_runs import CASES, case, forked, probed_exactly, resumed
from rank_scripts import exit_code

TIMEOUT_S = 60

SCENARIOS: dict[int, dict[str, Callable[[int], Any]]] = {
    2: {
        **{name: case(name) for name in CASES},
        "probed exactly": probed_exactly,
        "resumed": resumed,
        "forked": lambda rank: forked([rank]),
        "disagreements": disagreements,
        "wrapped": wrapped,
        "toggled under ddp": toggled_under_ddp,
        "traffic": traffic,
    },
    3: {"averaged gradients": averaged_gradients, "averages": averages},
}
"""By the number of ranks. With three, the order of a sum shows in its last bits."""


def be_rank(rank: int, ranks: int, folder: Path) -> None:
    # a hang ends with a traceback of where it hung
    faulthandler.dump_traceback_later(TIMEOUT_S, exit=True)
    store = dist.FileStore(str(folder / f"store of {ranks}"), ranks)
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
    for name, scenario in SCENARIOS[ranks].items():
        torch.save(scenario(rank), folder / f"{name}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path) -> int:
    # imported once, here, for all ranks; forking is safe as long as this process has computed nothing
    from transformers import LlamaForCausalLM  # noqa: F401

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=be_rank, args=(rank, ranks, folder), daemon=True)
        for ranks in SCENARIOS
        for rank in range(ranks)
    ]
    return exit_code(processes)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
