"""`python -m harness partial`: tables, figures and page of the runs that are there, where jobs of a study failed.

They go to `results/<study>/partial/`, apart from what Snakemake makes when everything is there.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's command line."""
    parser.add_argument("--config", type=Path, required=True, help="config/<study>.yaml")


def run(args: argparse.Namespace) -> int:
    """Write what can be written, and say what is missing and what to do about it."""
    from harness.progress import say
    from harness.reporting.collecting import collect
    from harness.reporting.failures import failed_runs
    from harness.reporting.figures import write_figures
    from harness.reporting.frames import read_frames, write_frames
    from harness.reporting.page import write_page
    from harness.reporting.tables import write_tables
    from harness.study.config import load_study
    from harness.study.last_words import FAILED, NOT_RUN
    from harness.study.paths import Paths
    from harness.study.plan import resolve_study

    study, paths = load_study(args.config, inputs_needed=False), Paths()
    plan = resolve_study(study)
    missing = failed_runs(plan, paths)
    if len(missing) < len(plan.runs):
        out = paths.study(study.study) / "partial"
        write_frames(collect(plan, paths, failed=missing), out)
        frames = read_frames(out)
        # with those whose record cannot be trusted
        without = frames.runs[frames.runs["status"].isin([FAILED, NOT_RUN])]
        missing = dict(zip(without["run"], without["status_why"], strict=True))
        write_tables(frames, study, out / "tables")
        write_figures(frames, study, out / "figures")
        write_page(frames, study, out, out / "report.html")
        say(f"{len(plan.runs) - len(missing)} of {len(plan.runs)} runs are there: {out / 'report.html'}")
    for why, names in _by_reason(missing).items():
        say(f"missing: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {why}")
    if missing:
        say("the same command again makes what is missing; a method that cannot run may be taken out of the config")
    return 0


def _by_reason(missing: dict[str, str]) -> dict[str, list[str]]:
    """Runs by their reason."""
    found: dict[str, list[str]] = {}
    for name, why in missing.items():
        found.setdefault(why, []).append(name)
    return found
