"""Processes that train one run together, over gloo on the CPU: what each of them finds goes to files, for `test_ranks`.

Run as a script: `python tests/support/training_ranks.py <folder>`. All processes are forked from one that has imported
everything, since imports cost more than the training.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from harness.checking.tiny import LR, tiny_inputs, tiny_training
from harness.records.code import code_of, training
from harness.records.run import TrainRecord
from harness.study.spec import Observation
from harness.training import loop
from harness.training.batches import Batches
from harness.training.loading import Inputs
from quick_runs import quicken
from rank_scripts import exit_code

from baselines.method import Method
from grass import distributed

TIMEOUT_S = 300
STEPS = 6
STOPPED_AFTER = 3
MICRO = {"steps": STEPS, "batch_size": 8, "micro_batch_size": 2}
"""Four micro-batches a step: two each for two processes, one each for four."""
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "lora": ("lora", {"rank": 4, "alpha": 8}),
    "grass": ("grass", {"active_layers": 2, "sample_every": 2, "probe_steps": 4, "temperature": 1.0}),
}
COUNTS = (1, 2, 4)
RESUMED = ("full", "grass")


def run(inputs: Inputs, folder: Path, name: str, *, seed: int = 0, state: Path | None = None) -> TrainRecord:
    module, options = METHODS.get(name, (name, {}))
    return loop.train(
        tiny_training(module, options, **MICRO), name=name, lr=LR, lr_searched=False, seed=seed, inputs=inputs,
        folder=folder, state_folder=state, observation=Observation(every_steps=STEPS, rows=4),
    )  # fmt: skip


def straight(rank: int, inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Each method from beginning to end, into one folder, where only rank 0 may write."""
    return {name: kept(run(inputs, folder / name, name)) for name in METHODS}


def stopped(rank: int, inputs: Inputs, folder: Path) -> dict[str, Any]:
    """The last rank alone is told to end, in the middle of a step."""
    codes = {}
    usual = Method.set_lr_factor

    def told(self: Method, factor: float) -> None:
        told.calls += 1
        if told.calls == STOPPED_AFTER and rank == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # by the launcher as well
        usual(self, factor)

    for name in RESUMED:
        told.calls = 0
        with mock.patch.object(Method, "set_lr_factor", told):
            try:
                run(inputs, folder / "stopped" / name, name, state=folder / "state" / name)
            except SystemExit as ended:
                codes[name] = ended.code
    return codes


def resumed(rank: int, inputs: Inputs, folder: Path) -> dict[str, Any]:
    return {name: kept(run(inputs, folder / "resumed" / name, name, state=folder / "state" / name)) for name in RESUMED}


def planted(rank: int, inputs: Inputs, folder: Path) -> dict[str, Any]:
    """What is to be noticed."""
    found: dict[str, Any] = {"cannot": kept(run(inputs, folder / "cannot", "badam"))}
    try:
        run(inputs, folder / "order", "full", seed=rank)
    except RuntimeError as error:
        found["other order"] = str(error)

    def apart(parameters: Any) -> None:
        """Gradients of every process stay its own."""

    with mock.patch.object(distributed, "average_gradients", apart):
        found["unsynchronised"] = kept(run(inputs, folder / "apart", "full"))

    def of_its_rows(self: Batches, step: int) -> int:
        """A mean of the processes' means, which gives short answers more weight."""
        numbers = self.own_numbers(step)
        return dist.get_world_size() * sum(label >= 0 for n in numbers for label in self._rows[n].labels[1:])

    with mock.patch.object(Batches, "label_tokens", of_its_rows):
        found["mean of means"] = kept(run(inputs, folder / "means", "full"))
    return found


def kept(record: TrainRecord) -> dict[str, Any]:
    return record.model_dump(mode="json")


SESSIONS: list[dict[int, list[Callable[..., dict[str, Any]]]]] = [
    {1: [straight], 2: [straight, stopped, planted], 4: [straight]},
    {1: [resumed], 4: [resumed]},
]
"""Sessions one after the other; in each, the groups by their number of processes, at the same time."""


def be_rank(rank: int, count: int, number: int, folder: Path) -> None:
    # a hang ends with a traceback of where it hung
    faulthandler.dump_traceback_later(TIMEOUT_S, exit=True)
    if count > 1:
        store = dist.FileStore(str(folder / f"store {number} of {count}"), count)
        timeout = timedelta(seconds=TIMEOUT_S)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timeout)
    inputs = Inputs(model=folder / "inputs" / "model", rows=folder / "inputs" / "rows")
    for scenario in SESSIONS[number][count]:
        found = scenario(rank, inputs, folder / str(count))
        (folder / f"{scenario.__name__}-{count}-{rank}.json").write_text(json.dumps(found))
    if count > 1:
        dist.barrier()
        dist.destroy_process_group()


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    context = multiprocessing.get_context("fork")
    # in a process of its own, since forking is safe only as long as this one has computed nothing
    maker = context.Process(target=tiny_inputs, args=(folder / "inputs",))
    maker.start()
    maker.join()
    import peft  # noqa: F401
    from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

    quicken(pytest.MonkeyPatch())  # not undone: this process and those that it forks do nothing else
    for module in {module for module, _ in METHODS.values()}:
        code_of(training(module))  # read once for all ranks
    failed = 0
    for number, groups in enumerate(SESSIONS):
        ranks = [(rank, count, number, folder) for count in groups for rank in range(count)]
        processes = [context.Process(target=be_rank, args=one, daemon=True) for one in ranks]
        failed = max(failed, exit_code(processes))
        if number == 0 and not failed:
            for count in (1, 4):  # what two processes have left
                shutil.copytree(folder / "2" / "state", folder / str(count) / "state")
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
