"""Scores a finished run: accuracy and held-out loss of each suite, as one record and one table."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from harness.errors import UserError
from harness.evaluating.heldout import HeldoutLoss, heldout_loss
from harness.evaluating.lm import PROTOCOL, SuiteOutcome, decoding, score_suite, wrap
from harness.inputs.overlap import normalised
from harness.inputs.prompts import Prompt, Row
from harness.inputs.rows import read_rows
from harness.records.atomic import whole_file, write_json
from harness.records.code import EVALUATION
from harness.records.columns import DOCUMENT_COLUMNS
from harness.records.provenance import provenance
from harness.records.run import EvalRecord, SuiteScore, TrainRecord
from harness.step.outcomes import is_out_of_memory, out_of_memory_why
from harness.study.jobs import EvalJob, SuiteJob
from harness.study.paths import resolve
from harness.study.spec import Scoring
from harness.tasks.protocol import check_gold

CHANCE: dict[Scoring, float | None] = {
    "number": None,
    "letter": 1 / 5,
    "true_false": 1 / 2,
    "solution": 1 / 2,
    "ending": 1 / 4,
    "option": 1 / 2,
}
"""Accuracy of a blind guess among the rule's strings; `answer` has two to five options, see `chance`."""


def evaluate(
    job: EvalJob,
    *,
    train_record: TrainRecord,
    suite_folders: Mapping[str, Path],
    rows_folder: Path,
    out: Path,
    batch_size: int,
) -> EvalRecord:
    """Score a run's checkpoint on every suite; write `out` (an EvalRecord) and, beside it, its rows as parquet.

    A run that left no checkpoint (out of memory, skipped, ...) gives a record with status `skipped` and an empty table;
    one that runs out of memory while it is scored gives `oom`, with what was scored before.

    Args:
        job: the suites and the length rows are cut to in the held-out loss.
        train_record: of the run; its checkpoint is relative to the current folder, or has `${NAME}` in it.
        suite_folders: folder with test.json, by suite label.
        rows_folder: the training rows (train.json), against which leaked test rows are counted.
        out: path of the record; the table gets its suffix `.parquet` and `columns.DOCUMENT_COLUMNS`.
        batch_size: rows per forward pass, in generation and loss.

    Raises:
        UserError: the checkpoint is missing, a file of rows is missing or empty or holds an answer that its scoring
            rule cannot score, or a suite's `max_new_tokens` does not fit the model.
    """
    started = time.perf_counter()
    if train_record.checkpoint is None:
        reason = train_record.status_why or train_record.checkpoint_why or "no reason recorded"
        return _write(out, [], EvalRecord(
            name=job.name, run=train_record.name, status="skipped",
            status_why=f"no checkpoint to score: training ended as {train_record.status} ({reason})",
            decoding={}, scores=[], wall_s=time.perf_counter() - started,
            provenance=provenance(roots=EVALUATION, inputs={}),
        ))  # fmt: skip

    from harness.inputs.models import load_model, load_tokenizer

    checkpoint = resolve(train_record.checkpoint)
    if not checkpoint.is_dir():
        raise UserError(f"{checkpoint}: no such checkpoint folder; train run {train_record.name} again")
    files = {suite.label: suite_folders[suite.label] / "test.json" for suite in job.suites}
    tests = {suite.label: _test_rows(suite, files[suite.label]) for suite in job.suites}
    trained = {normalised(row["instruction"]) for row in read_rows(rows_folder / "train.json")}
    inputs = {f"suite:{label}": path for label, path in files.items()} | {"rows:train": rows_folder / "train.json"}
    inputs |= {f"checkpoint:{path.name}": path for path in checkpoint.iterdir() if path.is_file()}
    device = train_record.recipe["device"]
    origin = provenance(roots=EVALUATION, inputs=inputs, device=device)
    model = load_model(checkpoint, weight_dtype=train_record.recipe["weight_dtype"]).to(device).eval()
    prompt = Prompt(job.prompt, load_tokenizer(checkpoint))
    lm = wrap(model, prompt.tokenizer, batch_size=batch_size)
    settings = decoding(lm) | {"suites": {}}
    scores: list[SuiteScore] = []
    documents: list[dict[str, Any]] = []
    facts: dict[str, Any] = {
        "name": job.name, "run": train_record.name, "decoding": settings, "provenance": origin,
    }  # fmt: skip
    for suite in job.suites:
        rows = tests[suite.label]
        try:
            answered, loss = _outcomes(lm, prompt, suite, files[suite.label], rows, job.max_length, batch_size)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            why = f"{out_of_memory_why(error, suite.label)} (lower runtime.eval_batch_size, {batch_size} here)"
            seconds = time.perf_counter() - started
            return _write(
                out, documents, EvalRecord(status="oom", status_why=why, scores=scores, wall_s=seconds, **facts)
            )
        settings["suites"][suite.label] = {
            "max_new_tokens": suite.source.max_new_tokens,
            "heldout_max_tokens": job.max_length,
            "heldout_rows": sum(document.tokens > 0 for document in loss.documents),
            "heldout_truncated_rows": loss.truncated_rows,
        }
        scores.append(_suite_score(suite, rows, answered, loss, trained))
        documents += _document_rows(train_record.name, suite.label, rows, answered, loss)
    seconds = time.perf_counter() - started
    return _write(out, documents, EvalRecord(status="ok", scores=scores, wall_s=seconds, **facts))


def _outcomes(
    lm: Any, prompt: Prompt, suite: SuiteJob, file: Path, rows: Sequence[Row], max_length: int, batch_size: int
) -> tuple[SuiteOutcome, HeldoutLoss]:
    source = suite.source
    answered = score_suite(lm, file=file, rows=rows, scoring=source.scoring, max_new_tokens=source.max_new_tokens)
    loss = heldout_loss(lm.model, prompt, rows, max_length=max_length, batch_size=batch_size)
    return answered, loss


def chance(scoring: Scoring, rows: Sequence[Row]) -> float | None:
    """Expected accuracy of a blind guess, or None if there are no options to guess among.

    For `answer` the options are counted in each instruction's tail ("Answer format: answer1/answer2/answer3"); a row
    without that tail makes it None.
    """
    if scoring != "answer":
        return CHANCE[scoring]
    options = [len(set(re.findall(r"answer\d", row["instruction"].rpartition("Answer format:")[2]))) for row in rows]
    return fmean(1 / count for count in options) if all(options) else None


def _test_rows(suite: SuiteJob, file: Path) -> list[Row]:
    rows: list[Row] = read_rows(file)
    if not rows:
        raise UserError(f"{file}: no rows to score; make the suite again")
    for number, row in enumerate(rows, start=1):
        try:
            check_gold(suite.source.scoring, row["answer"])
        except ValueError as error:
            raise UserError(f"{file}, row {number}: {error}; change the suite's `scoring` or the row") from None
    return rows


def _suite_score(
    suite: SuiteJob, rows: Sequence[Row], answered: SuiteOutcome, loss: HeldoutLoss, trained: set[str]
) -> SuiteScore:
    source = suite.source
    return SuiteScore(
        suite=suite.label,
        scoring=source.scoring,
        protocol=PROTOCOL,
        rows=len(rows),
        # A file with exactly `limit` rows cannot be distinguished from a longer one here, and counts as limited.
        limited=source.kind != "generated" and source.limit is not None and len(rows) >= source.limit,
        correct=sum(outcome.correct for outcome in answered.outcomes),
        unparsed=sum(outcome.prediction is None for outcome in answered.outcomes),
        chance=chance(source.scoring, rows),
        heldout_loss=loss.mean,
        heldout_loss_why=loss.why,
        heldout_tokens=loss.tokens,
        truncated_rows=answered.truncated_rows,
        leaked_rows=sum(normalised(row["instruction"]) in trained for row in rows),
    )


def _document_rows(
    run: str, suite: str, rows: Sequence[Row], answered: SuiteOutcome, loss: HeldoutLoss
) -> list[dict[str, Any]]:
    return [
        {
            "run": run, "suite": suite, "document": number, "correct": outcome.correct,
            "parsed": outcome.prediction is not None, "prediction": outcome.prediction, "gold": row["answer"],
            "loss": document.loss, "tokens": document.tokens,
        }
        for number, (row, outcome, document) in enumerate(zip(rows, answered.outcomes, loss.documents, strict=True))
    ]  # fmt: skip


def _write(out: Path, documents: list[dict[str, Any]], record: EvalRecord) -> EvalRecord:
    """Write the table first, then the record: if the record exists, both do."""
    table = pd.DataFrame(documents, columns=list(DOCUMENT_COLUMNS)).astype(DOCUMENT_COLUMNS)
    with whole_file(out.with_suffix(".parquet")) as temporary:
        table.to_parquet(temporary, index=False)
    write_json(out, record.model_dump(mode="json"))
    return record
