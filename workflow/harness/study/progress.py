"""How far a study is: each of its jobs says so as it ends, with the time left."""

from __future__ import annotations

import os
import time
from pathlib import Path

from harness.errors import UserError
from harness.progress import STUDY_FILE, duration, say
from harness.study.config import load_study
from harness.study.paths import Paths
from harness.study.plan import outputs, resolve_study

STUDY_STARTED, STUDY_DONE = "GRASS_STUDY_STARTED", "GRASS_STUDY_DONE"
"""Environment of a study's jobs: when it was started (s), and the work that was done by then."""


def announce(what: str) -> None:
    """Say that a job ended; within a study, also how far the study is."""
    config = os.environ.get(STUDY_FILE)
    if config is None:
        say(what)
        return
    try:
        done, total = study_work(Path(config))
    except UserError:  # the file was edited since, and is being edited: no reason to lose what this job has made
        say(what)
        return
    spent = time.time() - float(os.environ[STUDY_STARTED])
    fresh = done - float(os.environ[STUDY_DONE])
    left = f", about {duration(spent * (total - done) / fresh)} left" if fresh > 0 else ""
    say(f"[{done / total:4.0%}, {duration(spent)} gone{left}] {what}")


def study_work(config: Path) -> tuple[float, float]:
    """Work done and work in all of a study, in optimizer steps of its jobs (see `plan.Output.weight`)."""
    listed = outputs(resolve_study(load_study(config, inputs_needed=False)), Paths())
    return sum(o.weight for o in listed if o.path.exists()), sum(o.weight for o in listed)
