"""`python -m harness figures`: all figures of a study, from its collected rows."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.reporting.figures import write_figures
from harness.reporting.frames import read_frames
from harness.study.config import load_study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The stage's command line."""
    parser.add_argument("--config", type=Path, required=True, help="the study's file")
    parser.add_argument("--frames", type=Path, required=True, help="folder of the collected parquet files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the figures")


def output(args: argparse.Namespace) -> Path:
    """What the job writes last."""
    out: Path = args.out
    return out.with_suffix(".json")


def run(args: argparse.Namespace) -> int:
    """Write the figures; 0."""
    write_figures(read_frames(args.frames), load_study(args.config, inputs_needed=False), args.out)
    return 0
