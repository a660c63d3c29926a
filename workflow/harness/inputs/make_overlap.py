"""Which test items of a task's suites occur in its training rows: counted before anything trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.inputs.overlap import masked, normalised
from harness.inputs.prompts import Row, user_text
from harness.inputs.rows import read_rows
from harness.records.atomic import write_record
from harness.records.code import OVERLAP
from harness.records.inputs import OverlapRecord, SuiteOverlap
from harness.records.provenance import provenance
from harness.study.jobs import OverlapJob
from harness.study.paths import Paths

NGRAM = 13
"""Words in a row that two texts must share to count as one by n-grams; shorter questions are not compared so."""


@dataclass(frozen=True)
class Overlap:
    """Numbers of the test items that occur in training rows, from 0, by what counts as the same."""

    exact: tuple[int, ...]
    """The question, by `normalised`."""
    masked: tuple[int, ...]
    """The question, by `masked`."""
    ngram: tuple[int, ...]
    """`NGRAM` words in a row of the question stand in a training row, in its question or its answer."""


def overlap(training: Sequence[Row], items: Sequence[Row]) -> Overlap:
    """Which test items occur in training rows.

    Args:
        training: rows that are trained on.
        items: of a test set; their answers are not compared.
    """
    exact, numberless = {normalised(user_text(row)) for row in training}, {masked(row) for row in training}
    # the test set's are the fewer: training rows are read past them
    holders: dict[tuple[str, ...], set[int]] = {}
    for number, row in enumerate(items):
        for words in _ngrams(user_text(row)):
            holders.setdefault(words, set()).add(number)
    shared: set[int] = set()
    for row in training:
        for words in _ngrams(f"{user_text(row)} {row['output']}"):
            shared |= holders.get(words, set())
    return Overlap(
        exact=tuple(n for n, row in enumerate(items) if normalised(user_text(row)) in exact),
        masked=tuple(n for n, row in enumerate(items) if masked(row) in numberless),
        ngram=tuple(sorted(shared)),
    )


def _ngrams(text: str) -> Iterator[tuple[str, ...]]:
    words = normalised(text).split()
    return zip(*(words[start:] for start in range(NGRAM)), strict=False)


def make_overlap(job: OverlapJob, paths: Paths, out: Path) -> OverlapRecord:
    """Compare every suite with the training rows, and write the record.

    Args:
        job: which rows, which suites.
        paths: of the prepared rows and suites.
        out: the record.
    """
    rows_file = paths.rows(job.rows.name) / "train.json"
    training, files, suites = read_rows(rows_file), {"training rows": rows_file}, []
    for suite in job.suites:
        file = paths.suite(suite.name) / "test.json"
        items, files[f"suite {suite.label}"] = read_rows(file), file
        found = overlap(training, items)
        suites.append(
            SuiteOverlap(
                suite=suite.label, items=len(items), exact=list(found.exact), masked=list(found.masked),
                ngram=list(found.ngram),
            )
        )  # fmt: skip
    record = OverlapRecord(
        name=job.name, task=job.rows.label, train_rows=len(training), suites=suites,
        provenance=provenance(roots=OVERLAP, inputs=files),
    )  # fmt: skip
    write_record(out, record)
    return record
