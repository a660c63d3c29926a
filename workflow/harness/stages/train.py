"""`python -m harness train`: one training run from its resolved spec; resumes where a killed one left off."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.records.run import TrainRecord
    from harness.study.jobs import RunJob

IMPORTS = (
    "harness.training.loading",
    "harness.training.loop",
    "harness.forecasting.run_forecast",
)
"""What `run` imports and takes long, for warm workers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's command line."""
    parser.add_argument("--spec", type=Path, required=True, help="results/runs/<run>/spec.json")
    parser.add_argument("--forecast", type=Path, help="forecast.json, for a run on a GPU: what cannot fit never starts")
    parser.add_argument("--threads", type=int, required=True, help="torch threads")
    parser.add_argument("--checkpoint-every", type=int, required=True, help="steps between two resume states")
    parser.add_argument(
        "--gpus", type=int, default=1, help="processes that train it together, started by torchrun, each on its GPU"
    )
    parser.add_argument("--rank-of", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)  # set for those processes


def output(args: argparse.Namespace) -> Path:
    """What the job writes; one of several processes hands its record over."""
    spec: Path = args.spec
    return spec.parent / "train.json" if args.rank_of is None else _outcome(args.rank_of, int(os.environ["RANK"]))


def run(args: argparse.Namespace) -> int:
    """Write train.json beside the spec; a run that went out of memory or diverged is a record too."""
    from harness.measuring.gpu import lease_for
    from harness.study import curves
    from harness.study.jobs import RunJob, read_job

    curves.wanted()  # what is missing is said before the run waits for a GPU
    job = read_job(args.spec, RunJob, args.spec.parent.name)
    if args.rank_of is not None:
        return _be_rank(args, job)
    # before torch is imported: the lease says which GPUs it will see
    with lease_for(job.training.recipe.device, count=args.gpus):
        found = _train(args, job) if args.gpus == 1 else _train_together(args, job)
        if isinstance(found, int):
            return found
        _finish(args, job, found)
        return 0


def _outcome(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.json"


def _train_together(args: argparse.Namespace, job: RunJob) -> TrainRecord | int:
    """The record of rank 0, or of a rank that ran out of memory; or an exit code."""
    from harness.records.reading import read
    from harness.records.run import TrainRecord
    from harness.training.launching import launch

    with tempfile.TemporaryDirectory() as given:
        folder = Path(given)
        words = ["-m", "harness", "train", "--spec", args.spec, "--threads", max(1, args.threads // args.gpus)]
        words += ["--checkpoint-every", args.checkpoint_every, "--gpus", args.gpus, "--rank-of", folder]
        words += [] if args.forecast is None else ["--forecast", args.forecast]
        code = launch([str(word) for word in words], processes=args.gpus)
        files = [_outcome(folder, rank) for rank in range(args.gpus)]
        records = [read(file, TrainRecord) for file in files if file.is_file()]
    if code == 0:
        return records[0]
    return next((record for record in records if record.status == "oom"), code)


def _be_rank(args: argparse.Namespace, job: RunJob) -> int:
    """Train as one of several processes, and hand the record over; the exit code is 1 if that ends the others."""
    device = job.training.recipe.device
    if device == "cuda":
        # before torch is imported: this process sees its own GPU alone
        visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(os.environ["LOCAL_RANK"])]
    from harness.records import atomic
    from harness.sign import signing
    from harness.training.ranks import group

    first = int(os.environ["RANK"]) == 0
    # the parent, which holds the run's own sign, only waits
    with group(device), signing(args.spec.parent / "train.json") if first else nullcontext():
        record = _train(args, job)
        atomic.write_json(output(args), record.model_dump(mode="json"))
        if record.status == "oom":
            # the others wait for this one's gradients: torchrun ends them
            raise SystemExit(1)
    return 0


def _train(args: argparse.Namespace, job: RunJob) -> TrainRecord:
    import torch

    from harness.forecasting.run_forecast import refusal_of
    from harness.records.reading import read
    from harness.records.run import SearchRecord
    from harness.study.paths import Paths
    from harness.training.loading import inputs_of
    from harness.training.loop import train

    torch.set_num_threads(args.threads)
    folder: Path = args.spec.parent
    paths = Paths(folder.parents[1])
    lr, search = job.lr, job.search_job()
    if search is not None:
        found = read(paths.search(search.name) / "search.json", SearchRecord)
        # no rate trained: the run fails at the grid's first one in the same way, and is recorded as such
        lr = found.lr if found.lr is not None else search.search.grid[0]
    return train(
        job.training,
        name=job.name,
        lr=lr,
        lr_searched=search is not None,
        seed=job.seed,
        inputs=inputs_of(job.training, paths),
        folder=folder,
        state_folder=paths.state(job.name),
        checkpoint_every=args.checkpoint_every,
        observation=job.observation,
        refusal=refusal_of(args.forecast),
    )


def _finish(args: argparse.Namespace, job: RunJob, record: TrainRecord) -> None:
    """Write the record, and remove what is not needed any more."""
    from harness.measuring.rates import with_rates
    from harness.records import atomic
    from harness.study.keep import remove_unneeded
    from harness.study.paths import Paths
    from harness.study.progress import announce

    folder: Path = args.spec.parent
    paths = Paths(folder.parents[1])
    atomic.write_record(folder / "train.json", with_rates(record))
    if record.checkpoint is not None or record.status != "ok":
        # a trained model that could not be exported stays there
        shutil.rmtree(paths.state(job.name), ignore_errors=True)
    remove_unneeded(job.name, paths, scored=False)
    announce(f"train {job.name}: {record.status}{f' ({record.status_why})' if record.status_why else ''}")
