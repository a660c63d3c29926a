"""`python -m harness page`: the study's html page, from its collected rows and the tables and figures made of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from harness.reporting.frames import read_frames
from harness.reporting.page import write_page
from harness.study.config import load_study


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The stage's command line."""
    parser.add_argument("--config", type=Path, required=True, help="the study's file")
    parser.add_argument(
        "--frames",
        type=Path,
        required=True,
        help="folder of the collected parquet files, with tables/ and figures/ in it",
    )
    parser.add_argument("--out", type=Path, required=True, help="the html file")


def output(args: argparse.Namespace) -> Path:
    """What the job writes."""
    out: Path = args.out
    return out


def run(args: argparse.Namespace) -> int:
    """Write the page; 0."""
    write_page(read_frames(args.frames), load_study(args.config, inputs_needed=False), args.frames, args.out)
    return 0
