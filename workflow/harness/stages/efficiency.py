"""`python -m harness efficiency`: measure memory and speed of a training step on one GPU, or forecast its memory."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import missing_package

if TYPE_CHECKING:
    from harness.efficiency.command import Report
    from harness.efficiency.store import Store
    from harness.step.spec import EfficiencyStudy


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's command line."""
    from harness.efficiency.budget import BUDGET_S, REPORT_S

    parser.add_argument("--config", type=Path, default=Path("config/efficiency.yaml"), help="the study's file")
    parser.add_argument("--out", type=Path, default=Path("results/efficiency"), help="folder for everything")
    parser.add_argument("--published", type=Path, default=Path("config/published/grass.yaml"), help="published numbers")
    parser.add_argument(
        "--budget",
        type=float,
        help=f"seconds, {REPORT_S:.0f} of them for the report; default {BUDGET_S:.0f}, and no end for forecasts",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="a CPU rehearses on the tiny model")
    parser.add_argument(
        "--only", action="append", default=[], metavar="GLOB", help="model/method/settings/shape; may be given again"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats of each cell")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a repeat, a multiple of 5")
    parser.add_argument("--warmup", type=int, default=5, help="steps before them, a multiple of 5")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--forecast", action="store_true", help="no device: forecast memory, and report")
    instead.add_argument("--report", action="store_true", help="tables and figures of the records in --out alone")
    parser.add_argument("--cores", type=int, default=2, help="forecasts side by side")


def run(args: argparse.Namespace) -> int:
    """Measure or forecast, then write tables and figures; 1 if a cell failed by a fault of the program."""
    from harness.efficiency.command import check, forecast, measure
    from harness.efficiency.store import Store
    from harness.progress import say
    from harness.step.spec import load_efficiency

    check(args)
    study, store = load_efficiency(args.config), Store(args.out)
    report = _reporter(args, study, store)
    if args.report:
        say(f"{report()}; all in {store.folder}")
        return 0
    return (forecast if args.forecast else measure)(args, study, store, report)


def _reporter(args: argparse.Namespace, study: EfficiencyStudy, store: Store) -> Report:
    """What makes tables and figures; a machine that only measures may lack what they need, and keeps its records."""
    try:
        from harness.reporting.efficiency.report import write_report
        from harness.reporting.published import load_published
    except ModuleNotFoundError as error:
        if args.report or missing_package(error) is None:
            raise
        return lambda: (
            "no tables and figures here (run `python -m harness efficiency --report` where pandas and matplotlib are)"
        )
    published = load_published(args.published)
    return lambda: f"{len(write_report(study, store, published))} figures"
