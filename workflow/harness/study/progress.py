"""Progress of a study: each of its jobs prints the progress and the time left when it ends."""

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
    """Print that a job ended; within a study, also the study's progress."""
    config = os.environ.get(STUDY_FILE)
    if config is None:
        say(what)
        return
    try:
        done, total = study_work(Path(config))
    except UserError:  # the config file is being edited: this must not make a finished job fail
        say(what)
        return
    spent = time.time() - float(os.environ[STUDY_STARTED])
    fresh = done - float(os.environ[STUDY_DONE])
    left = f", about {duration(spent * (total - done) / fresh)} left" if fresh > 0 else ""
    say(f"[{done / total:4.0%}, {duration(spent)} gone{left}] {what}")


def study_work(config: Path) -> tuple[float, float]:
    """Work done and total work of a study, in optimizer steps of its jobs (see `plan.Output.weight`)."""
    listed = outputs(resolve_study(load_study(config, inputs_needed=False)), Paths())
    return sum(o.weight for o in listed if o.path.exists()), sum(o.weight for o in listed)
