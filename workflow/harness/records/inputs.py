"""The records of a study's inputs: models, rows, and what a task's suites share with its rows."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from harness.records.record import Provenance, Record

CameFrom = Literal["pretraining", "local", "mirror", "hub", "hub cache"]


class ModelRecord(Record):
    """A model ready to load (manifest.json)."""

    name: str
    folder: str = Field(description="relative to the results folder's parent, or with ${input} still in it")
    came_from: CameFrom | None = None
    revision: str | None = Field(
        default=None, description="commit on the hub; null for other models, and for a mirror folder that does not say"
    )
    files_sha256: dict[str, str]
    parameters: int | None
    attention: str | None = Field(default=None, description="as it is computed: sdpa, or eager")
    attention_why: str | None = Field(default=None, description="why not sdpa")
    pretraining_loss: list[tuple[int, float]] = Field(default_factory=list, description="(step, loss)")
    wall_s: float
    provenance: Provenance


class RowsRecord(Record):
    """Rows ready to read (manifest.json)."""

    name: str
    files_sha256: dict[str, str]
    rows: dict[str, int] = Field(description="by split; of lm-eval's own tasks, items scored by task")
    dropped_rows: int = 0
    dropped_why: str | None = None
    overlapping_rows: int = Field(default=0, description="left out: their text occurs in a file named by `without`")
    provenance: Provenance


class SuiteOverlap(Record):
    """Test items of one suite that occur in the training rows: their numbers in the suite, from 0."""

    suite: str
    items: int
    exact: list[int] = Field(description="the same question, up to case and punctuation")
    masked: list[int] = Field(description="the same with every number left out")
    ngram: list[int] = Field(description="13 words in a row of the question stand in a training row")


class OverlapRecord(Record):
    """What a task's suites share with its training rows (overlap.json)."""

    name: str
    task: str
    train_rows: int
    suites: list[SuiteOverlap]
    provenance: Provenance
