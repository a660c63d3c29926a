"""`python -m harness collect`: join a study's records into the flat tables that reports are made from."""

from __future__ import annotations

import argparse
from pathlib import Path

IMPORTS = ("harness.reporting.collecting",)
"""What `run` imports and takes long, for warm workers."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's command line."""
    parser.add_argument("--config", type=Path, required=True, help="config/<study>.yaml")
    parser.add_argument("--out", type=Path, required=True, help="results/<study>")


def run(args: argparse.Namespace) -> int:
    """Write one parquet file a table, each whole or not at all."""
    from harness.reporting.collecting import collect
    from harness.reporting.frames import write_frames
    from harness.study.config import load_study
    from harness.study.paths import Paths
    from harness.study.plan import resolve_study

    frames = collect(resolve_study(load_study(args.config, inputs_needed=False)), Paths(args.out.parent))
    write_frames(frames, args.out)
    return 0
