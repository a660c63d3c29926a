"""`python -m harness search`: choose one method's learning rate on one model and task, on validation rows."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.study.jobs import SearchJob

IMPORTS = (
    "harness.training.loading",
    "harness.training.search",
    "harness.forecasting.run_forecast",
)
"""What `run` imports and takes long, for warm workers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's command line."""
    parser.add_argument("--spec", type=Path, required=True, help="results/searches/<search>/spec.json")
    parser.add_argument("--forecast", type=Path, help="forecast.json, for a run on a GPU: what cannot fit never starts")
    parser.add_argument("--threads", type=int, required=True, help="torch threads")
    parser.add_argument("--checkpoint-every", type=int, required=True, help="steps between two resume states")


def output(args: argparse.Namespace) -> Path:
    """What the job writes."""
    spec: Path = args.spec
    return spec.parent / "search.json"


def run(args: argparse.Namespace) -> int:
    """Write search.json beside the spec; finished trials of a killed search are kept and reused."""
    from harness.measuring.gpu import lease_for
    from harness.study.jobs import SearchJob, read_job

    job = read_job(args.spec, SearchJob, args.spec.parent.name)
    # before torch is imported: the lease says which GPU it will see
    with lease_for(job.training.recipe.device):
        return _search(args, job)


def _search(args: argparse.Namespace, job: SearchJob) -> int:
    import torch

    from harness.forecasting.run_forecast import refusal_of
    from harness.records import atomic
    from harness.study.paths import Paths
    from harness.study.progress import announce
    from harness.training.loading import inputs_of
    from harness.training.search import search

    torch.set_num_threads(args.threads)
    folder: Path = args.spec.parent
    paths = Paths(folder.parents[1])
    inputs = inputs_of(job.training, paths)
    record = search(
        job,
        inputs=inputs,
        trials_folder=paths.state(job.name),
        checkpoint_every=args.checkpoint_every,
        refusal=refusal_of(args.forecast),
    )
    atomic.write_record(folder / "search.json", record)
    shutil.rmtree(paths.state(job.name), ignore_errors=True)
    announce(f"search {job.name}: {f'lr {record.lr:g}' if record.lr is not None else record.lr_why}")
    return 0
