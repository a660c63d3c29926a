"""One suite of one run, as numbers: what was asked, what was right, and what a guess would have got."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from harness.errors import UserError
from harness.evaluating.asking import Asking
from harness.evaluating.heldout import DocumentLoss, HeldoutLoss
from harness.evaluating.lm import SuiteOutcome
from harness.inputs.choices import question
from harness.inputs.overlap import normalised
from harness.inputs.prompts import Row, user_text
from harness.inputs.rows import read_rows
from harness.records.run import SuiteScore
from harness.study.jobs import SuiteJob
from harness.study.sources import Choices, FileScoring, LmEvalSuite, ReadSuite
from harness.tasks.protocol import check_row

CHANCE: dict[FileScoring, float | None] = {
    "number": None,
    "letter": 1 / 5,
    "true_false": 1 / 2,
    "solution": 1 / 2,
    "ending": 1 / 4,
    "option": 1 / 2,
}
"""Accuracy of a blind guess among the rule's strings; `answer` has two to five options, see `chance`."""

NOT_TRAINED_SO = "the suite asks otherwise than training does"
"""Why there is no held-out loss where the options' own texts are scored."""


def settings_of(
    suite: SuiteJob, rows: Sequence[Row], asking: Asking, loss: HeldoutLoss | None, max_length: int
) -> dict[str, Any]:
    """How one suite was scored, for the record; with the first question as the model read it."""
    source = suite.source
    assert not isinstance(source, LmEvalSuite)
    choices = choices_of(suite)
    asked = None if choices is None else question(rows[0], choices)
    found: dict[str, Any] = {
        "first_question": asking.text(rows[0]) if asked is None or asked.text is None else asked.text,
        "shots": len(asking.examples) if choices != "texts" else 0,
    }
    if asked is not None:
        found["first_answers"] = list(asked.answers)
    else:
        found["max_new_tokens"], found["num_beams"] = source.max_new_tokens, beams_of(suite)
    if loss is not None:
        found["heldout_max_tokens"] = max_length
        found["heldout_rows"] = sum(document.tokens > 0 for document in loss.documents)
        found["heldout_truncated_rows"] = loss.truncated_rows
    return found


def choices_of(suite: SuiteJob) -> Choices | None:
    """What the allowed answers are, of a suite scored by likelihood."""
    return suite.source.choices if isinstance(suite.source, ReadSuite) else None


def beams_of(suite: SuiteJob) -> int:
    """Beams of the search for what the model writes."""
    return suite.source.beams if isinstance(suite.source, ReadSuite) else 1


def key_of(row: Row) -> str:
    """What is compared to find test rows among the training rows."""
    return normalised(user_text(row))


def chance(scoring: FileScoring, rows: Sequence[Row], *, choices: Choices | None = None) -> float | None:
    """Expected accuracy of a blind guess, or None if there are no options to guess among.

    For `answer` the options are counted in each instruction's tail ("Answer format: answer1/answer2/answer3"); a row
    without that tail makes it None.
    """
    if choices is not None:
        return fmean(1 / len(question(row, choices).answers) for row in rows)
    if scoring != "answer":
        return CHANCE.get(scoring)
    options = [len(set(re.findall(r"answer\d", row["instruction"].rpartition("Answer format:")[2]))) for row in rows]
    return fmean(1 / count for count in options) if all(options) else None


def checked_rows(suite: SuiteJob, file: Path) -> list[Row]:
    """Rows of a suite's file, each with an answer that its scoring can find right.

    Raises:
        UserError: there are none, or one cannot be scored; the message names file and row.
    """
    rows: list[Row] = read_rows(file)
    if not rows:
        raise UserError(f"{file}: no rows to score; make the suite again")
    for number, row in enumerate(rows, start=1):
        try:
            check_row(suite.source, row)
        except ValueError as error:
            raise UserError(f"{file}, row {number}: {error}; change the suite's `scoring` or the row") from None
    return rows


def suite_score(
    suite: SuiteJob, rows: Sequence[Row], answered: SuiteOutcome, loss: HeldoutLoss | None, trained: set[str], name: str
) -> SuiteScore:
    """The score of a suite, from the outcome of each of its rows."""
    source = suite.source
    assert not isinstance(source, LmEvalSuite)
    normalised_outcomes = [outcome.correct_normalised for outcome in answered.outcomes]
    return SuiteScore(
        suite=suite.label,
        scoring=source.scoring,
        protocol=name,
        rows=len(rows),
        # A file with exactly `limit` rows cannot be distinguished from a longer one here, and counts as limited.
        limited=source.kind != "generated" and source.limit is not None and len(rows) >= source.limit,
        correct=sum(outcome.correct for outcome in answered.outcomes),
        correct_normalised=None if None in normalised_outcomes else sum(map(bool, normalised_outcomes)),
        unparsed=sum(outcome.prediction is None for outcome in answered.outcomes),
        chance=chance(source.scoring, rows, choices=choices_of(suite)),
        heldout_loss=None if loss is None else loss.mean,
        heldout_loss_why=NOT_TRAINED_SO if loss is None else loss.why,
        heldout_tokens=0 if loss is None else loss.tokens,
        truncated_rows=answered.truncated_rows,
        leaked_rows=sum(key_of(row) in trained for row in rows),
    )


def document_rows(
    run: str, suite: str, rows: Sequence[Row], answered: SuiteOutcome, loss: HeldoutLoss | None
) -> list[dict[str, Any]]:
    """Rows of the table of documents, see `harness.records.columns.DOCUMENT_COLUMNS`."""
    losses = [DocumentLoss(loss=None, tokens=0)] * len(rows) if loss is None else loss.documents
    return [
        {
            "run": run, "suite": suite, "document": number, "correct": outcome.correct,
            "correct_normalised": outcome.correct_normalised, "parsed": outcome.prediction is not None,
            "prediction": outcome.prediction, "gold": row["answer"], "loss": document.loss, "tokens": document.tokens,
        }
        for number, (row, outcome, document) in enumerate(zip(rows, answered.outcomes, losses, strict=True))
    ]  # fmt: skip
