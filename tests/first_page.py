"""Time to a first page: `python -m tests.first_page [--times 3] [--commit HEAD] [--target quick] [--out FILE]`.

Each time the project is cloned into an empty folder at one commit, is given this environment's packages, and `make`
runs there as a newcomer's would after installation. Shown are wall time, the processor time of the whole machine
meanwhile (other work on it counts too, and is said), and where the time went: what Snakemake's log says of its jobs,
to its resolution of a second. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import median, stdev

import psutil

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = Path(sys.prefix)
MARK = ".ready"
"""File by which the Makefile knows that packages are installed."""
_MOMENT = re.compile(r"\[(\w{3} \w{3} +\d+ \d\d:\d\d:\d\d \d{4})\]")
_BEGUN = re.compile(r"(?:local)?rule (\w+):")
_NUMBER = re.compile(r" +jobid: (\d+)")
_ENDED = re.compile(r"Finished jobid: (\d+)")


@dataclass
class Sitting:
    """One `make`."""

    wall_s: float
    busy_s: float
    """Processor time of the whole machine meanwhile."""
    before_s: float
    """Until the first job began: Snakemake's own start."""
    jobs: Counter[str] = field(default_factory=Counter)
    """Number of jobs by rule."""
    job_s: Counter[str] = field(default_factory=Counter)
    """Their wall time, which they spend on one core each."""


def clone(commit: str, folder: Path) -> str:
    """A clone with this environment's packages; returns the commit's short hash."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder)], check=True)
    subprocess.run(["git", "-C", str(folder), "checkout", "--quiet", commit], check=True)
    (folder / ".venv").symlink_to(ENVIRONMENT)
    (ENVIRONMENT / MARK).touch()  # or `make` would install, since every file of a clone is new
    told = subprocess.run(["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], check=True, capture_output=True)
    return told.stdout.decode().strip()


def read_log(text: str) -> tuple[dict[str, tuple[str, datetime]], dict[str, datetime]]:
    """Rule and begin of each job, and end of each, by its number in Snakemake's log."""
    begun: dict[str, tuple[str, datetime]] = {}
    ended: dict[str, datetime] = {}
    moment, rule = datetime.min, ""
    for line in text.splitlines():
        if found := _MOMENT.match(line):
            moment = datetime.strptime(found[1], "%a %b %d %H:%M:%S %Y")
        elif found := _BEGUN.match(line):
            rule = found[1]
        elif found := _NUMBER.match(line):
            begun[found[1]] = rule, moment
        elif found := _ENDED.match(line):
            ended[found[1]] = moment
    return begun, ended


def busy() -> float:
    """Processor time of the whole machine since it was started, in seconds."""
    spent = psutil.cpu_times()
    return float(spent.user + spent.nice + spent.system)


def sit(folder: Path, target: str) -> Sitting:
    """Run `make` in a clone."""
    environment = {name: value for name, value in os.environ.items() if name not in {"MIRROR", "GRASS_DATA"}}
    # the packages of the environment are another checkout's
    environment["PYTHONPATH"] = f"{folder}:{folder / 'workflow'}"
    before, at, clock = busy(), time.perf_counter(), datetime.now()
    subprocess.run(["make", target], cwd=folder, env=environment, check=True)
    wall_s, busy_s = time.perf_counter() - at, busy() - before
    (log,) = (folder / ".snakemake" / "log").glob("*.snakemake.log")
    begun, ended = read_log(log.read_text(encoding="utf-8"))
    sitting = Sitting(wall_s, busy_s, (min(moment for _, moment in begun.values()) - clock).total_seconds())
    for number, moment in ended.items():
        rule, start = begun[number]
        sitting.jobs[rule] += 1
        sitting.job_s[rule] += (moment - start).total_seconds()
    return sitting


def page(commit: str, target: str, sittings: list[Sitting]) -> str:
    """Wall times, and the median time of each rule's jobs."""
    walls = [sitting.wall_s for sitting in sittings]
    spread = f", standard deviation {stdev(walls):.1f}" if len(walls) > 1 else ""
    lines = [
        f"`make {target}` at {commit}, {len(sittings)} times in an empty clone after installation, on "
        f"{psutil.cpu_count()} cores, Python {platform.python_version()}:",
        "",
        f"- {', '.join(f'{wall:.0f}' for wall in walls)} s; median {median(walls):.0f} s{spread};",
        f"- processor time of the whole machine meanwhile, medians: {median(s.busy_s for s in sittings):.0f} s; "
        f"{median(s.before_s for s in sittings):.0f} s until the first job.",
        "",
        "| rule | jobs | their wall time on one core each, s (median) | share |",
        "| --- | --- | --- | --- |",
    ]
    seconds = {rule: median(s.job_s[rule] for s in sittings) for rule in sittings[0].jobs}
    for rule, spent in sorted(seconds.items(), key=lambda pair: -pair[1]):
        lines.append(f"| {rule} | {sittings[0].jobs[rule]} | {spent:.0f} | {spent / sum(seconds.values()):.0%} |")
    lines.append(f"| together | {sum(sittings[0].jobs.values())} | {sum(seconds.values()):.0f} | |")
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
