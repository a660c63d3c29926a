"""`python -m harness pretrain`: pretrain a study's own small model from its resolved spec."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

IMPORTS = ("harness.inputs.pretrain",)
"""What `run` imports and takes long, for warm workers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's command line."""
    parser.add_argument("--spec", type=Path, required=True, help="spec.json of the model; results go beside it")
    parser.add_argument("--threads", type=int, required=True, help="torch threads")


def output(args: argparse.Namespace) -> Path:
    """What the job writes."""
    spec: Path = args.spec
    return spec.parent / "manifest.json"


def run(args: argparse.Namespace) -> int:
    """Write the model and its manifest beside the spec."""
    import torch

    from harness.inputs.pretrain import make_pretrained
    from harness.study.jobs import ModelJob, read_job
    from harness.study.paths import Paths
    from harness.study.progress import announce

    torch.set_num_threads(args.threads)
    job = read_job(args.spec, ModelJob, args.spec.parent.name)
    state = Paths(args.spec.parents[3]).state(job.name)
    record = make_pretrained(job, args.spec.parent, state_folder=state)
    shutil.rmtree(state, ignore_errors=True)
    announce(f"pretrain {job.name}: loss {record.pretraining_loss[-1][1]:.3f}")
    return 0
