"""`python -m harness evaluate`: score a finished run on the suites of its task, in a process of its own."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.records.run import TrainRecord

IMPORTS = (
    "harness.evaluating.score",
    "harness.evaluating.model",
    "harness.inputs.models",
    "lm_eval.tasks",
)
"""What `run` imports and takes long, for warm workers."""
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}
"""Read by the libraries while they are imported: no network, no bars among the log lines."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's command line."""
    parser.add_argument("--spec", type=Path, required=True, help="results/evals/<name>.json")
    parser.add_argument("--run", type=Path, required=True, help="results/runs/<run>")
    parser.add_argument("--out", type=Path, required=True, help="results/runs/<run>/eval/<name>.json")
    parser.add_argument("--threads", type=int, required=True, help="torch threads")
    parser.add_argument("--batch-size", type=int, required=True, help="rows per forward pass")


def output(args: argparse.Namespace) -> Path:
    """What the job writes."""
    out: Path = args.out
    return out


def run(args: argparse.Namespace) -> int:
    """Evaluate; a run that left no checkpoint gives a skipped record and exit code 0 all the same."""
    os.environ |= ENVIRONMENT
    from harness.measuring.gpu import lease_for
    from harness.records.reading import read
    from harness.records.run import TrainRecord
    from harness.study.keep import check_exported
    from harness.study.paths import Paths

    record = read(args.run / "train.json", TrainRecord)
    check_exported(args.run.name, record.checkpoint, Paths(args.run.parents[1]))
    # before torch is imported: the lease says which GPU it will see; a run without a checkpoint needs none
    with lease_for(record.recipe["device"] if record.checkpoint is not None else "cpu"):
        return _evaluate(args, record)


def _evaluate(args: argparse.Namespace, train_record: TrainRecord) -> int:
    import torch

    from harness.evaluating.score import evaluate
    from harness.records.held import check_files
    from harness.records.inputs import RowsRecord
    from harness.records.reading import read
    from harness.records.units import gib
    from harness.study.jobs import ROWS, SUITE, EvalJob, RunJob, read_job
    from harness.study.keep import remove_unneeded
    from harness.study.paths import Paths
    from harness.study.progress import announce

    torch.set_num_threads(args.threads)
    paths = Paths(args.run.parents[1])
    job = read_job(args.spec, EvalJob, args.spec.stem)
    training = read_job(args.run / "spec.json", RunJob, args.run.name).training
    for manifest in (paths.output(ROWS, training.rows.name), *(paths.output(SUITE, s.name) for s in job.all_suites)):
        check_files(manifest, read(manifest, RowsRecord).files_sha256)
    state = paths.state(f"{args.run.name}--{job.name}")
    record = evaluate(
        job,
        train_record=train_record,
        suite_folders={suite.label: paths.suite(suite.name) for suite in job.all_suites},
        rows_folder=paths.rows(training.rows.name),
        out=args.out,
        batch_size=args.batch_size,
        state_folder=state,
    )
    shutil.rmtree(state, ignore_errors=True)
    scores = [f"{s.suite} {s.correct}/{s.rows}" for s in record.scores]
    scores += [f"{s.suite} {s.task} {s.metric} {s.value:.4f}" for s in record.lm_eval if s.value is not None]
    freed = remove_unneeded(args.run.name, paths, scored=True)
    removed = f"; its model is removed (runtime.keep), {gib(freed)} GiB" if freed else ""
    announce(f"evaluate {record.run}: {', '.join(scores) or record.status_why}{removed}")
    return 0
