"""`python -m harness plan`: list a study's jobs, which are done, stale or to do, and what they take on disk."""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage's command line."""
    parser.add_argument("--config", type=Path, required=True, help="config/<study>.yaml")
    parser.add_argument("--all", action="store_true", help="also list inputs and searches, one a line")


def run(args: argparse.Namespace) -> int:
    """Print the table; nothing is written and nothing is computed."""
    from harness.records.reading import Stamp, read
    from harness.study.config import load_study
    from harness.study.paths import Places
    from harness.study.plan import folder_bytes, outputs, resolve_study
    from harness.study.stale import current_sha256

    places = Places()
    plan = resolve_study(load_study(args.config, inputs_needed=False))
    study = plan.study
    print(
        f"{study.study}: {len(study.models)} models x {len(study.tasks)} tasks x {len(study.methods)} methods "
        f"= {len(plan.runs)} runs, {len(plan.searches)} searches"
    )
    counts: dict[str, Counter[str]] = {}
    for output in outputs(plan, places):
        state, detail = "to do", ""
        if output.path.exists():
            record = read(output.path, Stamp)
            fresh = record.provenance.source_sha256 == current_sha256(plan, output)
            state, detail = ("done" if fresh else "stale"), record.status
        counts.setdefault(output.kind, Counter())[state] += 1
        if output.kind == "train" or args.all:
            print(f"  {state:<6} {output.kind:<9}{detail:<11}{output.name}")
    print()
    for kind, counter in counts.items():
        print(f"  {kind:<9}" + ", ".join(f"{number} {state}" for state, number in sorted(counter.items())))
    folders = [
        *(places.model(n) for n in plan.models),
        *(places.rows(n) for n in plan.rows),
        *(places.suite(n) for n in plan.suites),
        *(places.search(n) for n in plan.searches),
        *(places.run(n) for n in plan.runs),
    ]
    print(f"  on disk  {folder_bytes(folders) / 2**20:.1f} MiB under {places.root}/")
    if any(counter["stale"] for counter in counts.values()):
        print("  stale: made by other code than today's. It is kept; to make it anew: snakemake --force <its file>")
    return 0
