"""Progress of a study: each of its jobs prints the progress and the time left when it ends."""

from __future__ import annotations

import os
import time
from pathlib import Path

from harness.progress import duration, say
from harness.records.atomic import write_text
from harness.study.paths import Paths
from harness.study.plan import Plan, outputs

STUDY_STARTED, STUDY_DONE = "GRASS_STUDY_STARTED", "GRASS_STUDY_DONE"
"""Environment of a study's jobs: when it was started (s), and the work that was done by then."""
STUDY_WORK = "GRASS_STUDY_WORK"
"""Environment of a study's jobs: path of the list that `write_work` wrote."""


def announce(what: str) -> None:
    """Print that a job ended; within a study, also the study's progress.

    The list of work is read instead of the study: resolving ten thousand runs again at the end of each of them would
    take as long as the runs.
    """
    listed = os.environ.get(STUDY_WORK)
    try:
        work = None if listed is None else read_work(Path(listed))
    except FileNotFoundError:  # removed by hand: this must not make a finished job fail
        work = None
    if work is None:
        say(what)
        return
    done, total = work
    spent = time.time() - float(os.environ[STUDY_STARTED])
    fresh = done - float(os.environ[STUDY_DONE])
    left = f", about {duration(spent * (total - done) / fresh)} left" if fresh > 0 else ""
    say(f"[{done / total:4.0%}, {duration(spent)} gone{left}] {what}")


def begin(plan: Plan, paths: Paths, file: Path) -> dict[str, str]:
    """Write the list of a study's work; returns what its jobs are to find in their environment."""
    write_work(plan, paths, file)
    return {STUDY_WORK: str(file), STUDY_STARTED: str(time.time()), STUDY_DONE: str(read_work(file)[0])}


def write_work(plan: Plan, paths: Paths, file: Path) -> None:
    """Write the outputs of a study's jobs, one a line: work in optimizer steps (`plan.Output.weight`), tab, path."""
    write_text(file, "".join(f"{output.weight:g}\t{output.path}\n" for output in outputs(plan, paths)))


def read_work(file: Path) -> tuple[float, float]:
    """Work done and total work of a study, in optimizer steps, from the list that `write_work` wrote."""
    done = total = 0.0
    for line in file.read_text(encoding="utf-8").splitlines():
        weight, path = line.split("\t")
        total += float(weight)
        done += float(weight) * os.path.exists(path)
    return done, total
