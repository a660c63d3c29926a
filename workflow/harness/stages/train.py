"""`python -m harness train`: one training run from its resolved spec; resumes where a killed one left off."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.study.jobs import RunJob


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's command line."""
    parser.add_argument("--spec", type=Path, required=True, help="results/runs/<run>/spec.json")
    parser.add_argument("--forecast", type=Path, help="forecast.json, for a run on a GPU: what cannot fit never starts")
    parser.add_argument("--threads", type=int, required=True, help="torch threads")
    parser.add_argument("--checkpoint-every", type=int, required=True, help="steps between two resume states")


def output(args: argparse.Namespace) -> Path:
    """What the job writes."""
    spec: Path = args.spec
    return spec.parent / "train.json"


def run(args: argparse.Namespace) -> int:
    """Write train.json beside the spec; a run that went out of memory or diverged is a record too."""
    from harness.measuring.gpu import lease_for
    from harness.study.jobs import RunJob, read_job

    job = read_job(args.spec, RunJob, args.spec.parent.name)
    # before torch is imported: the lease says which GPU it will see
    with lease_for(job.training.recipe.device):
        return _train(args, job)


def _train(args: argparse.Namespace, job: RunJob) -> int:
    import torch

    from harness.forecasting.run_forecast import refusal_of
    from harness.measuring.rates import with_rates
    from harness.records import atomic
    from harness.records.reading import read
    from harness.records.run import SearchRecord
    from harness.study.keep import remove_unneeded
    from harness.study.paths import Paths
    from harness.study.progress import announce
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
    state = paths.state(job.name)
    record = train(
        job.training,
        name=job.name,
        lr=lr,
        lr_searched=search is not None,
        seed=job.seed,
        inputs=inputs_of(job.training, paths),
        folder=folder,
        state_folder=state,
        checkpoint_every=args.checkpoint_every,
        observation=job.observation,
        refusal=refusal_of(args.forecast),
    )
    atomic.write_record(folder / "train.json", with_rates(record))
    if record.checkpoint is not None or record.status != "ok":
        # a trained model that could not be exported stays there
        shutil.rmtree(state, ignore_errors=True)
    remove_unneeded(job.name, paths, scored=False)
    announce(f"train {job.name}: {record.status}{f' ({record.status_why})' if record.status_why else ''}")
    return 0
