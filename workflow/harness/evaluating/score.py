"""Scores a finished run: accuracy and held-out loss of each suite, as one record and one table."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from grass.layers import declared_module
from harness.errors import UserError
from harness.evaluating import finished
from harness.evaluating.asking import Asking
from harness.evaluating.heldout import heldout_loss
from harness.evaluating.lm import decoding, likelihood_suite, protocol, score_suite, wrap
from harness.evaluating.stock import score_stock
from harness.evaluating.suite_score import (
    beams_of,
    checked_rows,
    choices_of,
    document_rows,
    key_of,
    settings_of,
    suite_score,
)
from harness.inputs.prompts import Prompt, Row
from harness.inputs.rows import read_rows
from harness.inputs.tokens import check_ids
from harness.progress import say
from harness.records.atomic import whole_file, write_record
from harness.records.claim import claim, with_code
from harness.records.code import EVALUATION
from harness.records.columns import DOCUMENT_COLUMNS, LM_EVAL_SAMPLE_COLUMNS
from harness.records.held import hashes
from harness.records.provenance import provenance
from harness.records.record import Provenance
from harness.records.run import LM_EVAL_SAMPLES, EvalRecord, LmEvalScore, SuiteScore, TrainRecord
from harness.step.architecture import check_length
from harness.step.outcomes import CannotRunError, is_out_of_memory, out_of_memory_why
from harness.study.jobs import EvalJob, SuiteJob
from harness.study.paths import resolve
from harness.study.sources import LmEvalSuite


def evaluate(
    job: EvalJob,
    *,
    train_record: TrainRecord,
    suite_folders: Mapping[str, Path],
    rows_folder: Path,
    out: Path,
    batch_size: int,
    state_folder: Path | None = None,
) -> EvalRecord:
    """Score a run's checkpoint on every suite; write `out` (an EvalRecord) and, beside it, its rows as parquet.

    A run that left no checkpoint (out of memory, skipped, ...) gives a record with status `skipped` and an empty table;
    one that runs out of memory even with batches of one row gives `oom`, with what was scored before.

    Args:
        job: the suites and the length rows are cut to in the held-out loss.
        train_record: of the run; its checkpoint is relative to the current folder, or has `${NAME}` in it.
        suite_folders: folder with test.json, or with the data of a task of lm-eval, by suite label.
        rows_folder: the training rows (train.json), against which leaked test rows are counted.
        out: path of the record; the table gets its suffix `.parquet` and `columns.DOCUMENT_COLUMNS`.
        batch_size: rows per forward pass, in generation and loss.
        state_folder: where finished suites are kept, and taken up again after a kill; None: nothing is kept.

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
    tests = {
        suite.label: checked_rows(suite, suite_folders[suite.label] / "test.json")
        for suite in job.all_suites
        if not isinstance(suite.source, LmEvalSuite)
    }
    train_rows = read_rows(rows_folder / "train.json")
    if job.shots > len(train_rows):
        raise UserError(f"{job.shots} worked examples: task {job.task} has {len(train_rows)} training rows only")
    inputs = {f"suite:{label}": suite_folders[label] / "test.json" for label in tests}
    inputs |= {
        f"suite:{suite.label}": suite_folders[suite.label] / "manifest.json"
        for suite in job.all_suites
        if suite.label not in tests
    }
    inputs |= {"rows:train": rows_folder / "train.json"}
    inputs |= {f"checkpoint:{path.name}": path for path in checkpoint.iterdir() if path.is_file()}
    device = train_record.recipe["device"]
    origin = provenance(roots=EVALUATION, inputs=inputs, device=device)
    _check_model(train_record, origin)
    model = load_model(checkpoint, weight_dtype=train_record.recipe["weight_dtype"]).to(device).eval()
    prompt = Prompt(job.prompt, load_tokenizer(checkpoint))
    try:
        check_length(model, job.max_length, what="recipe.max_length")
    except CannotRunError as error:
        raise UserError(f"{checkpoint}: {error}") from None
    asking = Asking(prompt=prompt, examples=train_rows[: job.shots])
    asked = (asking.tokens(row) for rows in tests.values() for row in rows)
    check_ids(asked, tokenizer=prompt.tokenizer, embedding=declared_module(model, "get_input_embeddings"))
    lm = wrap(model, prompt.tokenizer, batch_size=batch_size)
    scorer = _Scorer(lm, job, run=train_record.name, asking=asking, trained={key_of(row) for row in train_rows})
    record = partial(
        EvalRecord, name=job.name, run=train_record.name, decoding=scorer.settings, scores=scorer.scores,
        lm_eval=scorer.lm_eval, provenance=origin,
    )  # fmt: skip
    if state_folder is not None:
        made_from = origin.input_sha256 | {"spec": job.name, "batch size": str(batch_size)}
        if dropped := claim(state_folder, with_code(made_from, EVALUATION)):
            say(f"evaluate {train_record.name}: {dropped}")
    for suite in job.all_suites:
        before = None if state_folder is None else finished.kept(state_folder, suite.label)
        if before is not None:
            scorer.take(suite.label, before)
            continue
        why = scorer.score_in_memory(suite, tests.get(suite.label), suite_folders[suite.label])
        if why is not None:
            _write_samples(out, scorer.samples, job)
            seconds = time.perf_counter() - started
            return _write(out, scorer.documents, record(status="oom", status_why=why, wall_s=seconds))
        if state_folder is not None:
            finished.keep(state_folder, suite.label, scorer.of(suite.label))
    _write_samples(out, scorer.samples, job)
    return _write(out, scorer.documents, record(status="ok", wall_s=time.perf_counter() - started))


def _check_model(train_record: TrainRecord, origin: Provenance) -> None:
    """What is scored is what was exported; where nothing was trained, what lay in the model's own folder then."""
    then = train_record.files_sha256 if train_record.steps_done else train_record.provenance.input_sha256
    of_file = "model/{}" if train_record.steps_done else "model {}"
    for role, value in origin.input_sha256.items():
        kind, _, name = role.partition(":")
        if kind == "checkpoint" and then.get(of_file.format(name), value) != value:
            raise UserError(
                f"{train_record.checkpoint} holds another model than run {train_record.name} "
                f"{'exported' if train_record.steps_done else 'was made from'}: {name} differs; put that model back, "
                "or remove the run's train.json to make it anew"
            )


class _Scorer:
    """Scores the suites of one run, one after the other, and keeps what came out.

    Args:
        lm: the model, made by `wrap`.
        job: what is scored.
        run: name of the run.
        asking: how the task's own suites are asked; those of forgetting have no worked examples.
        trained: keys of the training rows, see `key_of`.
    """

    def __init__(self, lm: Any, job: EvalJob, *, run: str, asking: Asking, trained: set[str]) -> None:
        self.lm, self.job, self.run, self.asking, self.trained = lm, job, run, asking, trained
        self.settings: dict[str, Any] = decoding(lm, asking) | {"suites": {}}
        self.scores: list[SuiteScore] = []
        self.lm_eval: list[LmEvalScore] = []
        self.documents: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []

    def of(self, label: str) -> finished.Finished:
        """What came out of one suite."""
        return finished.Finished(
            settings=self.settings["suites"][label],
            scores=[score for score in self.scores if score.suite == label],
            documents=[row for row in self.documents if row["suite"] == label],
            lm_eval=[score for score in self.lm_eval if score.suite == label],
            samples=[row for row in self.samples if row["suite"] == label],
        )

    def take(self, label: str, before: finished.Finished) -> None:
        """Take up a suite that was scored before."""
        self.settings["suites"][label] = before.settings
        self.scores += before.scores
        self.documents += before.documents
        self.lm_eval += before.lm_eval
        self.samples += before.samples

    def score_in_memory(self, suite: SuiteJob, rows: Sequence[Row] | None, folder: Path) -> str | None:
        """Score a suite, with batches of half the size where memory runs out; why not, if not even one row fits.

        Args:
            suite: the suite.
            rows: of its file; None: of lm-eval's own tasks.
            folder: where its rows or data lie.
        """
        self.lm.label = f"evaluate {self.run} {suite.label}"
        while True:
            try:
                if rows is None:
                    self._score_lm_eval(suite, folder)
                else:
                    self._score(suite, rows, folder / "test.json")
                return None
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                why = out_of_memory_why(error, suite.label)
            # out of the handler: until then the error holds the tensors of the batch that failed
            if self.lm.batch_size == 1:
                return f"{why} (with batches of one row)"
            self.lm.batch_size_per_gpu = self.lm.batch_size // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _score(self, suite: SuiteJob, rows: Sequence[Row], file: Path) -> None:
        source = suite.source
        assert not isinstance(source, LmEvalSuite)
        asking = self.asking if suite in self.job.suites else replace(self.asking, examples=())
        choices = choices_of(suite)
        if choices is not None:
            answered = likelihood_suite(self.lm, file=file, rows=rows, choices=choices, asking=asking)
        else:
            assert source.scoring != "likelihood"
            assert source.max_new_tokens is not None
            answered = score_suite(
                self.lm, file=file, rows=rows, scoring=source.scoring, max_new_tokens=source.max_new_tokens,
                beams=beams_of(suite), asking=asking,
            )  # fmt: skip
        loss = None
        if choices != "texts":  # asked otherwise than in training, so no answer was trained
            loss = heldout_loss(
                self.lm.model, self.asking.prompt, rows, max_length=self.job.max_length,
                batch_size=self.lm.batch_size,
            )  # fmt: skip
        settings = settings_of(suite, rows, asking, loss, self.job.max_length)
        self.settings["suites"][suite.label] = settings | {"batch_size": self.lm.batch_size}
        name = protocol(asking, choices=choices, beams=beams_of(suite))
        self.scores.append(suite_score(suite, rows, answered, loss, self.trained, name))
        self.documents += document_rows(self.run, suite.label, rows, answered, loss)

    def _score_lm_eval(self, suite: SuiteJob, folder: Path) -> None:
        found = score_stock(self.lm, suite, folder)
        self.settings["suites"][suite.label] = found.settings | {"batch_size": self.lm.batch_size}
        self.lm_eval += found.scores
        self.samples += [{"run": self.run} | row for row in found.documents]


def _write_samples(out: Path, samples: list[dict[str, Any]], job: EvalJob) -> None:
    """Write `columns.LM_EVAL_SAMPLE_COLUMNS`, if the job has a suite of kind lm-eval."""
    if any(isinstance(suite.source, LmEvalSuite) for suite in job.all_suites):
        table = pd.DataFrame(samples, columns=list(LM_EVAL_SAMPLE_COLUMNS)).astype(LM_EVAL_SAMPLE_COLUMNS)
        with whole_file(out.with_suffix(LM_EVAL_SAMPLES)) as temporary:
            table.to_parquet(temporary, index=False, compression="zstd")


def _write(out: Path, documents: list[dict[str, Any]], record: EvalRecord) -> EvalRecord:
    """Write the table first, then the record: if the record exists, both do."""
    table = pd.DataFrame(documents, columns=list(DOCUMENT_COLUMNS)).astype(DOCUMENT_COLUMNS)
    with whole_file(out.with_suffix(".parquet")) as temporary:
        table.to_parquet(temporary, index=False)
    tables = [file for suffix in (".parquet", LM_EVAL_SAMPLES) if (file := out.with_suffix(suffix)).is_file()]
    record = record.model_copy(update={"files_sha256": hashes(out.parent, tables)})
    write_record(out, record)
    return record
