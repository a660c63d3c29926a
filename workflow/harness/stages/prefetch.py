"""`python -m harness prefetch`: make rows, a suite or a model ready, or count what suites share with training rows."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's command line."""
    parser.add_argument("kind", choices=("model", "rows", "suite", "overlap"))
    parser.add_argument("--spec", type=Path, required=True, help="spec.json; results go beside it")


def output(args: argparse.Namespace) -> Path:
    """What the job writes."""
    spec: Path = args.spec
    return spec.parent / ("overlap.json" if args.kind == "overlap" else "manifest.json")


def run(args: argparse.Namespace) -> int:
    """Write manifest.json, and what it names, or overlap.json beside the spec."""
    from harness.study.jobs import ModelJob, OverlapJob, RowsJob, SuiteJob, read_job

    folder: Path = args.spec.parent
    if args.kind == "rows":
        from harness.inputs.make_rows import make_rows

        make_rows(read_job(args.spec, RowsJob, folder.name), folder)
    elif args.kind == "suite":
        from harness.study.sources import LmEvalSuite

        suite = read_job(args.spec, SuiteJob, folder.name)
        if isinstance(suite.source, LmEvalSuite):
            from harness.evaluating.stock_data import fetch

            fetch(suite, folder)
        else:
            from harness.inputs.make_rows import make_suite
            from harness.tasks.protocol import check_row

            make_suite(suite, folder, check=partial(check_row, suite.source))
    elif args.kind == "overlap":
        from harness.inputs.make_overlap import make_overlap
        from harness.study.paths import Paths

        make_overlap(read_job(args.spec, OverlapJob, folder.name), Paths(folder.parents[2]), output(args))
    else:
        from harness.inputs.make_models import make_model

        make_model(read_job(args.spec, ModelJob, folder.name), folder)
    return 0
