"""Bytes on disk that a study has yet to write, at most, and whether they are free. Imports no torch.

Counted is what is large: exported models, resume state, and models to fetch. Logs, scores and tables are not.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

from harness.records.units import gib
from harness.study import keep, needs
from harness.study.jobs import MODEL, TRAIN
from harness.study.paths import Paths, mirrored
from harness.study.plan import Plan, folder_bytes
from harness.study.sources import HubModel

STATES_OF_A_JOB = 2
"""Resume states of a run at one moment: the last two are kept, and the older one goes before the next is written."""


@dataclass(frozen=True)
class ToCome:
    """What a study has yet to write."""

    kept_models: int
    """Number of exported models that will stay."""
    kept_bytes: int
    passing_bytes: int
    """Exported models that are removed once they are scored, as many as there are at one moment."""
    state_bytes: int
    """Resume state of the runs that train at one moment."""
    fetched_bytes: int
    """Models that come over the network."""
    jobs: int
    """Runs at one moment."""
    free_bytes: int

    @property
    def peak_bytes(self) -> int:
        """All of it at one moment."""
        return self.kept_bytes + self.passing_bytes + self.state_bytes + self.fetched_bytes

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.peak_bytes <= self.free_bytes

    def parts(self) -> str:
        """What it is made of, in words."""
        words = {
            f"{self.kept_models} exported models that stay": self.kept_bytes,
            "models that are removed once scored": self.passing_bytes,
            f"resume state, {self.jobs} run{'s' * (self.jobs > 1)} at once": self.state_bytes,
            "models to fetch": self.fetched_bytes,
        }
        return ", ".join(f"{what} {gib(nbytes, 1)} GiB" for what, nbytes in words.items() if nbytes)


def jobs_at_once(plan: Plan, *, cores: int | None = None, nodes: int | None = None) -> int:
    """Runs that train at one moment: a GPU takes one, cores as many as have their threads; a cluster, one a node."""
    if nodes is not None:
        return nodes
    if any(run.training.recipe.device == "cuda" for run in plan.runs.values()):
        return 1
    return max(1, (cores or os.cpu_count() or 1) // plan.study.runtime.threads)


def to_come(plan: Plan, paths: Paths, *, jobs: int, files: Collection[Path] | None = None) -> ToCome:
    """What the study has yet to write when `jobs` runs train at one moment.

    Args:
        plan: of the study.
        paths: of its results.
        jobs: see `jobs_at_once`.
        files: outputs that will be made; None: every one that is missing.
    """

    def waits(path: Path) -> bool:
        return not path.is_file() if files is None else path in files

    stays = keep.kept(plan, paths)
    waiting = [name for name in keep.exporting(plan) if waits(paths.output(TRAIN, name))]
    sizes = {name: needs.weight_bytes(plan.runs[name].training, paths) for name in waiting}
    passing = sorted((size for name, size in sizes.items() if name not in stays), reverse=True)
    states = sorted((needs.state_bytes(plan.runs[name].training, paths) for name in waiting), reverse=True)
    saved = folder_bytes(paths.state(name) for name in waiting)
    fetched = [
        needs.WEIGHT_BYTES["bf16"] * needs.parameters(job, paths)
        for name, job in plan.models.items()
        if isinstance(job.source, HubModel) and not mirrored(job.source.repo) and waits(paths.output(MODEL, name))
    ]
    return ToCome(
        kept_models=sum(name in stays for name in waiting),
        kept_bytes=sum(size for name, size in sizes.items() if name in stays),
        passing_bytes=sum(passing[:jobs]),
        state_bytes=max(0, STATES_OF_A_JOB * sum(states[:jobs]) - saved),
        fetched_bytes=sum(fetched),
        jobs=jobs,
        free_bytes=free_bytes(paths.root),
    )


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that `folder` lies on, or will lie on."""
    folder = folder.absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


def too_little(plan: Plan, paths: Paths, *, jobs: int, files: Collection[Path] | None = None) -> str | None:
    """One line with both numbers and the mend where the study cannot fit on its disk; None where it can.

    The arguments are those of `to_come`.
    """
    asked = to_come(plan, paths, jobs=jobs, files=files)
    if asked.fits:
        return None
    least = to_come(_keeping_none(plan), paths, jobs=jobs, files=files)
    mend = f"free some under {paths.root}/, or put that folder on a larger disk"
    if least.peak_bytes < asked.peak_bytes:
        with_none = f"runtime.keep: none makes it {gib(least.peak_bytes, 1)} GiB"
        mend = f"{with_none}: set it in the config, or {mend}" if least.fits else f"{with_none}, still too much: {mend}"
    return (
        f"{plan.study.study}: too little disk: up to {gib(asked.peak_bytes, 1)} GiB to come ({asked.parts()}), and "
        f"{gib(asked.free_bytes, 1)} GiB are free; {mend}"
    )


def _keeping_none(plan: Plan) -> Plan:
    runtime = plan.study.runtime.model_copy(update={"keep": "none"})
    return replace(plan, study=plan.study.model_copy(update={"runtime": runtime}))
