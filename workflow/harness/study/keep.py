"""Which exported models stay on disk, by `runtime.keep`, and the removal of the others once they are scored.

Only `runs/<run>/model` is ever removed: a run's record, logs and scores stay, and so does the model that it started
from. Snakemake is told of `train.json` alone, so a run whose model is gone is not made again by itself.
"""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

from pydantic import BaseModel

from harness.errors import UserError
from harness.progress import STUDY_FILE
from harness.records.reading import Stamp, read
from harness.records.units import GIB
from harness.study.config import load_study, method_of
from harness.study.jobs import TRAIN
from harness.study.needs import weight_bytes
from harness.study.paths import Paths
from harness.study.plan import Plan, folder_bytes, resolve_study

LARGE_BYTES = GIB
"""Without `runtime.keep`, models above this size are removed once they are scored."""


def exported(paths: Paths, run: str) -> Path:
    """Folder of the model that a run exported."""
    return paths.run(run) / "model"


def exporting(plan: Plan) -> list[str]:
    """Runs that export a model: all but those of methods that take no step."""
    return [name for name, run in plan.runs.items() if method_of(plan.study, run.training.label)[0].TRAINS]


def kept(plan: Plan, paths: Paths) -> set[str]:
    """Runs whose exported model stays.

    `all` keeps every one, `none` none, and `last`, of each method on each model and task, the one of its last seed.
    """
    names, keep = exporting(plan), plan.study.runtime.keep
    if keep == "last":
        # later seeds replace earlier ones; with one spec for all, the order of the config decides
        last = {plan.runs[name].training.model_dump_json(): name for name in names}
        return set(last.values())
    if keep is None:
        return {name for name in names if _model_bytes(plan, paths, name) <= LARGE_BYTES}
    return set(names) if keep == "all" else set()


def _model_bytes(plan: Plan, paths: Paths, run: str) -> int:
    """Of the exported model: as it lies there, else as many bytes as its weights take."""
    return folder_bytes([exported(paths, run)]) or weight_bytes(plan.runs[run].training, paths)


def remove_unneeded(run: str, paths: Paths, *, scored: bool) -> int:
    """Within a study's job, remove a run's model if the study does not keep it and has no more need of it.

    A model is needed until every evaluation of it has a record; one that ran out of memory counts as none, since it
    can be tried again with smaller batches. Outside a study nothing is removed.

    Args:
        run: that just ended, or was just scored.
        paths: of its results.
        scored: whether it was just scored; after training alone, records of scores are of an earlier model.

    Returns:
        Bytes that were freed.
    """
    config = os.environ.get(STUDY_FILE)
    if config is None:
        return 0
    try:
        plan = resolve_study(load_study(Path(config), inputs_needed=False))
    except UserError:  # the config is being edited: rather keep too much
        return 0
    if run not in plan.runs or run in kept(plan, paths):
        return 0
    scores = _scores(plan, paths, run)
    if scores and not (scored and all(map(_is_scored, scores))):
        return 0
    freed = folder_bytes([exported(paths, run)])
    shutil.rmtree(exported(paths, run), ignore_errors=True)
    return freed


def _scores(plan: Plan, paths: Paths, run: str) -> list[Path]:
    """Records of the evaluations that need a run's model."""
    evaluation = plan.evaluation_of.get(run)
    return [] if evaluation is None else [paths.score(run, evaluation)]


def _is_scored(path: Path) -> bool:
    return path.is_file() and read(path, Stamp).status != "oom"


class _Trained(BaseModel):
    """What a run's record says of its model."""

    checkpoint: str | None = None


def gone(plan: Plan, paths: Paths) -> list[str]:
    """Finished runs that are still to be scored and whose model was removed: they must train again."""
    found = []
    for name in exporting(plan):
        record = paths.output(TRAIN, name)
        if not record.is_file() or exported(paths, name).is_dir() or all(map(_is_scored, _scores(plan, paths, name))):
            continue
        if read(record, _Trained).checkpoint == str(exported(paths, name)):
            found.append(name)
    return found


def check_exported(run: str, checkpoint: str | None, paths: Paths) -> None:
    """Refuse to score a run whose exported model was removed.

    Raises:
        UserError: in one line, with the command that trains the run again.
    """
    folder, config = exported(paths, run), Path(os.environ.get(STUDY_FILE, "<the study's config>"))
    if checkpoint is None or Path(checkpoint) != folder or folder.is_dir():
        return
    raise UserError(
        f"{folder} is gone: runtime.keep removes a model once it is scored, and another evaluation needs it now; train "
        f"the run again, with the --config of this study: {train_again([run], paths, config=config)}"
    )


def train_again(runs: list[str], paths: Paths, *, config: Path) -> str:
    """The command that makes runs anew."""
    files = " ".join(shlex.quote(str(paths.output(TRAIN, run))) for run in runs)
    return f"snakemake --cores 1 --config {shlex.quote(f'STUDY={config}')} --force {files}"
