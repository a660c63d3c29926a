"""`python -m harness tables`: all tables of a study, from its collected rows."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.reporting.frames import read_frames
from harness.reporting.tables import write_tables
from harness.study.config import load_study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The stage's command line."""
    parser.add_argument("--config", type=Path, required=True, help="the study's file")
    parser.add_argument("--frames", type=Path, required=True, help="folder of the collected parquet files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables")


def output(args: argparse.Namespace) -> Path:
    """What the job writes."""
    out: Path = args.out
    return out


def run(args: argparse.Namespace) -> int:
    """Write the tables; 0."""
    write_tables(read_frames(args.frames), load_study(args.config, inputs_needed=False), args.out)
    return 0
