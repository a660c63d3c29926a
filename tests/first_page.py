"""Time to a first page: `python -m tests.first_page [--times 3] [--commit HEAD] [--target quick] [--out FILE]`.

Each time the project is cloned into an empty folder at one commit, is given this environment's packages, and `make`
runs there as a newcomer's would after installation. Shown are wall time, the processor time of the whole machine
meanwhile (other work on it counts too), and where the time went: each job's wall time, from the first moment of its log
to the last. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, stdev

import psutil

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = Path(sys.prefix)
MARK = ".ready"
"""File by which the Makefile knows that packages are installed."""


@dataclass
class Sitting:
    """One `make`."""

    wall_s: float
    busy_s: float
    """Processor time of the whole machine meanwhile."""
    before_s: float
    """Until the first job began: Snakemake's own start."""
    alone_s: float
    """From the first job's begin to the first of two that ran side by side: what all others need."""
    report_s: float
    """From the end of the last run's scores to the end: tables, figures, page."""
    jobs: Counter[str] = field(default_factory=Counter)
    """Number of jobs by rule."""
    job_s: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Their wall time, which they spend on one core each."""


def clone(commit: str, folder: Path) -> str:
    """A clone with this environment's packages; returns the commit's short hash."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    subprocess.run(["git", "-C", str(folder), "checkout", "--quiet", commit], check=True)
    (folder / ".venv").symlink_to(ENVIRONMENT)
    (ENVIRONMENT / MARK).touch()  # or `make` would install, since every file of a clone is new
    told = subprocess.run(["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], check=True, capture_output=True)
    return told.stdout.decode().strip()


def read_logs(folder: Path) -> list[tuple[str, float, float]]:
    """Rule, begin and end (s since the epoch) of each job that left a log."""
    logs = [str(log) for log in sorted(folder.glob("*/*.log"))]
    # Python's own stat has no moment of birth on Linux
    told = subprocess.run(["stat", "--format", "%.3W %.3Y", *logs], check=True, capture_output=True, text=True).stdout
    moments = [tuple(map(float, line.split())) for line in told.splitlines()]
    return [(Path(log).parent.name, begun, ended) for log, (begun, ended) in zip(logs, moments, strict=True)]


def busy() -> float:
    """Processor time of the whole machine since it was started, in seconds."""
    spent = psutil.cpu_times()
    return float(spent.user + spent.nice + spent.system)


def sit(folder: Path, target: str) -> Sitting:
    """Run `make` in a clone."""
    environment = {name: value for name, value in os.environ.items() if name not in {"MIRROR", "GRASS_DATA"}}
    # the packages of the environment are another checkout's
    environment["PYTHONPATH"] = f"{folder}:{folder / 'workflow'}"
    before, began = busy(), time.time()
    subprocess.run(["make", target], cwd=folder, env=environment, check=True)
    ended, busy_s = time.time(), busy() - before
    jobs = read_logs(folder / "results" / "logs")
    first = min(begin for _, begin, _ in jobs)
    together = min(begin for rule, begin, _ in jobs if rule in {"search", "train"})
    scored = max(end for rule, _, end in jobs if rule == "evaluate")
    sitting = Sitting(ended - began, busy_s, first - began, together - first, ended - scored)
    for rule, begin, end in jobs:
        sitting.jobs[rule] += 1
        sitting.job_s[rule] += end - begin
    return sitting


def page(commit: str, target: str, sittings: list[Sitting]) -> str:
    """Wall times, and the median time of each rule's jobs."""
    walls = [sitting.wall_s for sitting in sittings]
    spread = f", standard deviation {stdev(walls):.1f}" if len(walls) > 1 else ""
    phases = {
        "until the first job": [s.before_s for s in sittings],
        "what all runs need, one core idle": [s.alone_s for s in sittings],
        "searches, runs and scores": [s.wall_s - s.before_s - s.alone_s - s.report_s for s in sittings],
        "tables, figures and page": [s.report_s for s in sittings],
    }
    lines = [
        f"`make {target}` at {commit}, {len(sittings)} times in an empty clone after installation, on "
        f"{psutil.cpu_count()} cores, Python {platform.python_version()}:",
        "",
        f"- {', '.join(f'{wall:.0f}' for wall in walls)} s; median {median(walls):.0f} s{spread};",
        f"- processor time of the whole machine meanwhile, median: {median(s.busy_s for s in sittings):.0f} s.",
        "",
        "| phase | wall time, s (median) |",
        "| --- | --- |",
        *(f"| {phase} | {median(seconds):.0f} |" for phase, seconds in phases.items()),
        "",
        "| jobs that say more than one line | number | their wall time on one core each, s (median) |",
        "| --- | --- | --- |",
    ]
    spent = {rule: median(s.job_s[rule] for s in sittings) for rule in sittings[0].jobs}
    for rule, seconds in sorted(spent.items(), key=lambda pair: -pair[1]):
        if seconds >= 1:
            lines.append(f"| {rule} | {sittings[0].jobs[rule]} | {seconds:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure, print, and write where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--commit", default="HEAD")
    parser.add_argument("--target", default="quick", help="of make; at an old commit perhaps another")
    parser.add_argument("--out", type=Path, help="a file that the page is added to")
    parser.add_argument("--folder", type=Path, help="where the clones stay; else they are removed")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sittings = []
        for number in range(given.times):
            folder = (given.folder or Path(temporary)) / f"clone{number}"
            commit = clone(given.commit, folder)
            sittings.append(sit(folder, given.target))
    text = page(commit, given.target, sittings)
    print(text)
    if given.out is not None:
        with given.out.open("a", encoding="utf-8") as file:
            file.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
