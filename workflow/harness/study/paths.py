"""Where things lie: the layout of the results folder, and paths with `${NAME}` in them.

Jobs are stored by what they are, outside any study; a study's own folder holds only what is made from its records.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError

RESERVED = ("inputs", "searches", "forecasts", "runs", "evals", "state", "logs", "published")
"""Names under results/ that no study may take."""

_VARIABLE = re.compile(r"\$\{([^}]*)\}")


@dataclass(frozen=True)
class Places:
    """Paths below one results folder."""

    root: Path = Path("results")

    def model(self, name: str) -> Path:
        """Folder of a model job."""
        return self.root / "inputs" / "models" / name

    def rows(self, name: str) -> Path:
        """Folder of training and validation rows."""
        return self.root / "inputs" / "rows" / name

    def suite(self, name: str) -> Path:
        """Folder of test rows."""
        return self.root / "inputs" / "suites" / name

    def search(self, name: str) -> Path:
        """Folder of a learning-rate search."""
        return self.root / "searches" / name

    def forecast(self, name: str) -> Path:
        """Folder of a forecast of memory."""
        return self.root / "forecasts" / name

    def run(self, name: str) -> Path:
        """Folder of a training run."""
        return self.root / "runs" / name

    def state(self, name: str) -> Path:
        """Resume state of a run or search; never a declared output, since Snakemake deletes those before a job."""
        return self.root / "state" / name

    def eval_spec(self, name: str) -> Path:
        """Resolved spec of an evaluation, shared by the runs it scores."""
        return self.root / "evals" / f"{name}.json"

    def score(self, run: str, evaluation: str) -> Path:
        """Scores of one run."""
        return self.run(run) / "eval" / f"{evaluation}.json"

    def study(self, label: str) -> Path:
        """What is made from a study's records."""
        return self.root / label


def resolve(text: str) -> Path:
    """A path with every `${NAME}` replaced by that environment variable.

    Raises:
        UserError: a variable is unset or empty; it is named.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if not os.environ.get(name):
            raise UserError(f"{name} is not set: export {name}=<path> or add --config {name}=<path>")
        return os.environ[name]

    return Path(_VARIABLE.sub(value, text))
