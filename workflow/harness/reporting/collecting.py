"""Turns records on disk into flat rows: the only module that knows both formats."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from harness.errors import UserError
from harness.progress import say
from harness.records.columns import FRAMES, LEFT_OUT, NOT_SCORED, RUNS
from harness.records.held import check_files
from harness.records.inputs import ModelRecord, OverlapRecord, RowsRecord
from harness.records.reading import read, read_jsonl
from harness.records.record import Provenance
from harness.records.run import LM_EVAL_SAMPLES, EvalRecord, ProbeRecord, SearchRecord, TrainRecord
from harness.reporting.frames import Frames, read_table, rows_to_frame, table_to_frame
from harness.reporting.record_rows import (
    believed_rows,
    lm_eval_row,
    observed_rows,
    overlap_rows,
    overlapping_rows,
    probe_row,
    probed_rows,
    score_row,
    step_row,
    trial_rows,
)
from harness.reporting.trusted import check_run, check_scores, check_search
from harness.study.jobs import MODEL, ROWS, RunJob
from harness.study.last_words import reason, status_of
from harness.study.paths import Paths
from harness.study.plan import Plan
from harness.study.sources import LmEvalSuite

PART_ROWS = 100_000
"""Rows that are held as Python objects before they become part of a table, which takes a tenth of the memory."""


def collect(plan: Plan, paths: Paths, *, failed: Mapping[str, str] | None = None) -> Frames:
    """All records of a study as frames; every record is checked against its schema while it is read.

    Args:
        plan: of the study.
        paths: of its results.
        failed: runs without a record, with the reason: they become rows that have nothing else, and so do runs whose
            record cannot be trusted. Other records may then be missing too. None: everything is there.

    Raises:
        UserError: a record is missing, damaged, or does not agree with what was run.
    """
    found = _Found()
    models, versions = OneModelEach(plan, paths), OneVersionEach()
    for name, job in plan.runs.items():
        why = None if failed is None else failed.get(name)
        try:
            found.add(
                _of_run(plan, paths, name, models, versions, unscored=failed is not None) if why is None else None
            )
        except UserError as error:
            if failed is None:
                raise
            why = f"collect failed: {error}"
        if why is not None:
            found.rows["runs"].append(_failed_row(name, job, why))
    for name, searched in plan.searches.items():
        path = paths.search(name) / "search.json"
        if failed is not None and not path.is_file():
            continue
        with _left_out(failed is not None):
            search = read(path, SearchRecord)
            check_search(search, name, searched, path)
            models.check(searched.training.model.name, search.provenance, path)
            found.rows["trials"] += trial_rows(search)
    for name, probing in plan.probes.items():
        path = paths.probe(name) / "probe.json"
        if failed is not None and not path.is_file():
            continue
        with _left_out(failed is not None):
            probe = read(path, ProbeRecord)
            models.check(probing.model.name, probe.provenance, path)
            found.rows["probes"].append(probe_row(probe))
            found.rows["probed"] += probed_rows(probe)
    for name in plan.overlaps:
        path = paths.overlap(name)
        if failed is not None and not path.is_file():
            continue
        with _left_out(failed is not None):
            shared = read(path, OverlapRecord)
            found.rows["overlaps"] += overlap_rows(shared)
            found.rows["overlapping"] += overlapping_rows(shared)
    return found.frames()


@contextmanager
def _left_out(partial: bool) -> Iterator[None]:
    """Of partial tables: a record that cannot be trusted is left out, and said."""
    try:
        yield
    except UserError as error:
        if not partial:
            raise
        say(f"left out: {error}")


class _Found:
    """Rows of the tables, and parts of tables that are already made."""

    def __init__(self) -> None:
        self.tables: dict[str, list[pd.DataFrame]] = {name: [] for name in FRAMES}
        self.read: dict[str, list[pa.Table]] = {name: [] for name in FRAMES}
        """Tables as they lie beside the records, to be cast many at a time."""
        self.read_rows = dict.fromkeys(FRAMES, 0)
        self.rows: dict[str, list[dict[str, Any]]] = {name: [] for name in FRAMES}

    def add(self, other: _Found | None) -> None:
        """Take the rows of a run, once all of them are trusted."""
        if other is not None:
            for name, read_ones in self.read.items():
                read_ones += other.read[name]
                self.read_rows[name] += sum(map(len, other.read[name]))
                if self.read_rows[name] >= PART_ROWS:
                    self._cast(name)
            for name, rows in self.rows.items():
                rows += other.rows[name]
                if len(rows) >= PART_ROWS:
                    self.tables[name].append(rows_to_frame(name, rows))
                    rows.clear()

    def _cast(self, name: str) -> None:
        if self.read[name]:
            # older tables lack the newest columns, or have another type where a column was all null
            joined = pa.concat_tables(self.read[name], promote_options="permissive")
            self.tables[name].append(table_to_frame(name, joined.to_pandas()))
            self.read[name].clear()
            self.read_rows[name] = 0

    def frames(self) -> Frames:
        """All of it."""
        for name in self.read:
            self._cast(name)
        return Frames(
            **{
                name: pd.concat([*made, rows_to_frame(name, self.rows[name])], ignore_index=True)
                for name, made in self.tables.items()
            }
        )


def _of_run(
    plan: Plan, paths: Paths, name: str, models: OneModelEach, versions: OneVersionEach, *, unscored: bool
) -> _Found:
    """All rows of one run.

    Args:
        plan: of the study.
        paths: of its results.
        name: of the run.
        models: what runs were made from so far.
        versions: of the tasks of lm-eval that runs were scored on so far.
        unscored: whether a run without scores is taken, with a note.

    Raises:
        UserError: a record or a file beside it is not what was written, or does not agree with what was run.
    """
    found, job, path = _Found(), plan.runs[name], paths.run(name) / "train.json"
    record = read(path, TrainRecord)
    models.check(job.training.model.name, record.provenance, path)
    check_files(path, {file: value for file, value in record.files_sha256.items() if file.endswith(".jsonl")})
    made = read(paths.output(ROWS, job.training.rows.name), RowsRecord)
    left_out = {"empty_rows": made.dropped_rows, "overlapping_rows": made.overlapping_rows}
    run = {column: source.of(record) for column, source in RUNS.items()} | left_out
    found.rows["runs"].append(run)
    steps = _lines(path.parent / "steps.jsonl")
    check_run(record, name, job, path, logged_steps=len(steps))
    found.rows["steps"] += [step_row(name, row) for row in steps]
    found.rows["believed"] += [r for row in _lines(path.parent / "believed.jsonl") for r in believed_rows(name, row)]
    found.rows["observed"] += [r for row in _lines(path.parent / "observed.jsonl") for r in observed_rows(name, row)]
    if name not in plan.evaluation_of:
        return found
    evaluation = plan.evaluation_of[name]
    score_file = paths.score(name, evaluation)
    if unscored and not score_file.is_file():
        _note(run, reason(paths, "evaluate", f"{name}--{evaluation}"))
        return found
    score = read(score_file, EvalRecord)
    check_files(score_file, score.files_sha256)
    if score.status == "oom":
        _note(run, str(score.status_why))
    if score.status != "skipped":
        kinds = {"documents": ".parquet"}
        if any(isinstance(suite.source, LmEvalSuite) for suite in plan.evals[evaluation].all_suites):
            kinds["lm_eval_documents"] = LM_EVAL_SAMPLES
        for kind, suffix in kinds.items():
            table = read_table(score_file.with_suffix(suffix), mend=f"delete {score_file} and run again")
            # samples have more columns than are reported
            found.read[kind].append(table.select([c for c in FRAMES[kind] if c in table.column_names]))
    documents = found.read["documents"][0] if found.read["documents"] else None
    check_scores(score, name, plan.evals[evaluation], documents, score_file)
    versions.check(score, score_file)
    found.rows["scores"] += [score_row(name, suite.model_dump()) for suite in score.scores]
    found.rows["lm_eval"] += [lm_eval_row(name, metric) for metric in score.lm_eval]
    return found


def _failed_row(name: str, job: RunJob, why: str) -> dict[str, Any]:
    known = {
        "run": name,
        "model": job.training.model.label,
        "task": job.training.rows.label,
        "method": job.training.label,
        "module": job.training.module,
        "seed": job.seed,
        "status": status_of(why),
        "status_why": why,
    }
    return {**dict.fromkeys([*RUNS, *LEFT_OUT]), **known}


def _note(run: dict[str, Any], why: str) -> None:
    """Note on a row of the runs why it has no scores."""
    run["notes"] = "; ".join(filter(None, [run["notes"], f"{NOT_SCORED}{why}"]))


class OneModelEach:
    """The models that a study's records were made from, by the hashes of their files: one for each model job.

    Their manifests decide; without one, the first record.
    """

    def __init__(self, plan: Plan, paths: Paths) -> None:
        manifests = {name: paths.output(MODEL, name) for name in plan.models}
        self._known = {
            name: (path, read(path, ModelRecord).files_sha256) for name, path in manifests.items() if path.is_file()
        }

    def check(self, model: str, provenance: Provenance, path: Path) -> None:
        """Refuse the record at `path` if it was made from another model than the others."""
        mine = {
            role.removeprefix("model "): value
            for role, value in provenance.input_sha256.items()
            if role.startswith("model ")
        }
        source, known = self._known.setdefault(model, (path, mine))
        differs = next((name for name in sorted(mine.keys() & known.keys()) if mine[name] != known[name]), None)
        if differs is not None:
            raise UserError(
                f"{path}: made from another model than {source} ({differs} differs), and one table must not mix two; "
                f"remove {path} and run again"
            )


class OneVersionEach:
    """The version of each task of lm-eval that a study's runs were scored on: two versions are two tests."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Path, str]] = {}

    def check(self, record: EvalRecord, path: Path) -> None:
        """Refuse the scores at `path` if a task had another version in earlier ones."""
        for score in record.lm_eval:
            source, known = self._known.setdefault(score.task, (path, score.version))
            if score.version != known:
                raise UserError(
                    f"{path}: lm-eval task {score.task} in version {score.version}, but {known} in {source}, and one "
                    "table must not mix two; remove the older one and run again"
                )


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path) if path.exists() else []
