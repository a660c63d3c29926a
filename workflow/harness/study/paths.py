"""Where things lie: the layout of the results folder, and paths with `${NAME}` in them.

Jobs are stored by their specs, outside any study; a study's own folder holds only what is made from its records.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.study.jobs import EVALUATE, FORECAST, KINDS, MODEL, OVERLAP, PROBE, ROWS, SEARCH, SUITE, TRAIN, Kind

RESERVED = (*dict.fromkeys(kind.root_folder for kind in KINDS), "state", "logs", "published", "advice")
"""Names under results/ that no study may take."""

MIRROR = "MIRROR"
"""Environment variable with the folder that holds `<org>/<name>/` of what need not come over the network."""
_VARIABLE = re.compile(r"\$\{([^}]*)\}")


@dataclass(frozen=True)
class Paths:
    """Paths below one results folder."""

    root: Path = Path("results")

    def spec(self, kind: Kind[Any], name: str) -> Path:
        """Resolved spec of a job."""
        return self.root / kind.spec_file.format(name=name)

    def output(self, kind: Kind[Any], name: str) -> Path:
        """Declared output of a job. Not for evaluations, which have one output per run: see `score`."""
        return self.root / kind.output.format(name=name)

    def model(self, name: str) -> Path:
        """Folder of a model job."""
        return self.output(MODEL, name).parent

    def rows(self, name: str) -> Path:
        """Folder of training and validation rows."""
        return self.output(ROWS, name).parent

    def suite(self, name: str) -> Path:
        """Folder of test rows."""
        return self.output(SUITE, name).parent

    def overlap(self, name: str) -> Path:
        """What a task's suites share with its training rows."""
        return self.output(OVERLAP, name)

    def probe(self, name: str) -> Path:
        """Folder of a probe of an untrained model."""
        return self.output(PROBE, name).parent

    def search(self, name: str) -> Path:
        """Folder of a learning-rate search."""
        return self.output(SEARCH, name).parent

    def forecast(self, name: str) -> Path:
        """Folder of a forecast of a run's memory."""
        return self.output(FORECAST, name).parent

    def run(self, name: str) -> Path:
        """Folder of a training run."""
        return self.output(TRAIN, name).parent

    def state(self, name: str) -> Path:
        """Resume state of a run or search; never a declared output, since Snakemake deletes outputs before a job."""
        return self.root / "state" / name

    def score(self, run: str, evaluation: str) -> Path:
        """Scores of one run."""
        return self.root / EVALUATE.output.format(run=run, name=evaluation)

    def study(self, label: str) -> Path:
        """Folder of the files made from a study's records."""
        return self.root / label


def mirrored(repo: str) -> str | None:
    """Where a repository of the hub lies in the mirror, with `${MIRROR}` in it; None where no mirror is given."""
    return f"${{{MIRROR}}}/{repo}" if os.environ.get(MIRROR) else None


def missing_in_mirror(repo: str) -> str:
    """What to say where the mirror has no such folder."""
    folder = os.environ[MIRROR]
    return (
        f"{MIRROR}={folder} has no folder {repo}; put the model there (hf download {repo} --local-dir "
        f"{folder}/{repo}), or leave {MIRROR} out to fetch it from the hub"
    )


def resolve(text: str) -> Path:
    """A path with every `${NAME}` replaced by that environment variable.

    Raises:
        UserError: a variable is unset or empty; the message names it.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if not os.environ.get(name):
            raise UserError(f"{name} is not set: export {name}=<path> or add --config {name}=<path>")
        return os.environ[name]

    return Path(_VARIABLE.sub(value, text))
