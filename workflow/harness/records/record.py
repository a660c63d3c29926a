"""What every record has: its strictness, and where it came from.

Every number carries its unit in its key (`_bytes`, `_s`, `_share`, `_tokens`, ...). What is not known is null, with the
reason under the same key + `_why`; never 0, never a sentinel.
"""

from __future__ import annotations

from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION: Final = 1


class Record(BaseModel):
    """Base of everything read back from disk: unknown keys are errors, so that an old record is noticed; and so are
    NaN and infinity, which no job writes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Provenance(Record):
    """Which code, packages, inputs and machine made a record."""

    schema_version: Literal[1] = SCHEMA_VERSION
    source_sha256: str = Field(description="of the code that made this record, comments left out")
    sources: dict[str, str] = Field(
        default_factory=dict,
        description="first 12 digits of the sha256 of each of its files, by module; empty in records older than this",
    )
    git_commit: str | None
    git_commit_why: str | None = None
    git_dirty: bool | None
    packages: dict[str, str]
    python: str
    platform: str
    device: str
    threads: int
    process: Literal["fresh", "worker"] = Field(
        default="fresh", description="worker: forked from one that had imported the same modules (harness.workers)"
    )
    started_utc: str
    input_sha256: dict[str, str] = Field(description="of every input file that was read, by role")
