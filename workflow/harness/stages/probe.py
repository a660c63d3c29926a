"""`python -m harness probe`: importance of an untrained model's layers on one task, from its resolved spec."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.study.jobs import ProbeJob

IMPORTS = (
    "harness.training.loading",
    "harness.training.probe",
)
"""What `run` imports and takes long, for warm workers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's command line."""
    parser.add_argument("--spec", type=Path, required=True, help="results/probes/<probe>/spec.json")
    parser.add_argument("--threads", type=int, required=True, help="torch threads")


def output(args: argparse.Namespace) -> Path:
    """What the job writes."""
    spec: Path = args.spec
    return spec.parent / "probe.json"


def run(args: argparse.Namespace) -> int:
    """Write probe.json beside the spec; a probe that went out of memory or diverged is a record too."""
    from harness.measuring.gpu import lease_for
    from harness.study.jobs import ProbeJob, read_job

    job = read_job(args.spec, ProbeJob, args.spec.parent.name)
    # before torch is imported: the lease says which GPU it will see
    with lease_for(job.device):
        return _probe(args, job)


def _probe(args: argparse.Namespace, job: ProbeJob) -> int:
    import torch

    from harness.records import atomic
    from harness.study.paths import Paths
    from harness.study.progress import announce
    from harness.training.loading import inputs_of
    from harness.training.probe import probe

    torch.set_num_threads(args.threads)
    folder: Path = args.spec.parent
    paths = Paths(folder.parents[1])
    record = probe(job, inputs_of(job, paths))
    atomic.write_record(folder / "probe.json", record)
    announce(f"probe {job.name}: {record.status}{f' ({record.status_why})' if record.status_why else ''}")
    return 0
