"""What a run was: the records that jobs write, and the flat rows that tables and figures are made from.

Every number carries its unit in its key (`_bytes`, `_s`, `_share`, `_tokens`, ...). What is not known is null, with the
reason under the same key + `_why`; never 0, never a sentinel.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1

Status = Literal["ok", "oom", "diverged", "disengaged", "skipped"]


class Record(BaseModel):
    """Base of everything read back from disk: unknown keys are errors, so that an old record is noticed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Provenance(Record):
    """Which code, packages, inputs and machine made a record."""

    schema_version: int = SCHEMA_VERSION
    source_sha256: str = Field(description="of the code that made this record, comments left out")
    git_commit: str | None
    git_commit_why: str | None = None
    git_dirty: bool | None
    packages: dict[str, str]
    python: str
    platform: str
    device: str
    threads: int
    started_utc: str
    input_sha256: dict[str, str] = Field(description="of every input file that was read, by role")


class ModelRecord(Record):
    """A model ready to load (manifest.json)."""

    name: str
    folder: str = Field(description="relative to the results folder's parent, or with ${input} still in it")
    files_sha256: dict[str, str]
    parameters: int | None
    pretraining_loss: list[tuple[int, float]] = Field(default_factory=list, description="(step, loss)")
    wall_s: float
    provenance: Provenance


class RowsRecord(Record):
    """Rows ready to read (manifest.json)."""

    name: str
    files_sha256: dict[str, str]
    rows: dict[str, int] = Field(description="by split")
    dropped_rows: int = 0
    dropped_why: str | None = None
    provenance: Provenance


class DataUse(Record):
    """What tokenising the rows of a run did to them."""

    train_rows: int
    truncated_rows: int = Field(description="cut at max_length; such a row has no end token")
    dropped_rows: int = Field(description="no answer token left after cutting")
    mean_tokens: float
    answer_tokens_share: float


class Memory(Record):
    """Peaks by phase, in bytes. Phases: load, prepare, first_step, steady, save."""

    host_peak_bytes: dict[str, int | None]
    host_peak_bytes_why: str | None = None
    device_allocated_peak_bytes: dict[str, int | None]
    device_reserved_peak_bytes: dict[str, int | None]
    device_why: str | None = None
    nvml_process_peak_bytes: int | None
    nvml_device_peak_bytes: int | None
    nvml_why: str | None = None
    state_peak_bytes: int | None = Field(
        description="live tensors at step ends that belong neither to the model nor to the harness"
    )


class Timing(Record):
    """The harness's clock; the observer, checkpoints and saving are outside it."""

    load_s: float
    prepare_s: float
    train_s: float = Field(description="sum of the steps")
    warmup_steps: int = Field(description="steps left out of the throughput")
    step_median_s: float | None
    step_p95_s: float | None
    throughput_tokens_per_s: float | None = Field(description="non-padding tokens, warm-up excluded")
    throughput_why: str | None = None
    device_synchronised: bool


class Check(Record):
    """One promise beside what the harness saw."""

    name: str
    promised: str
    observed: str
    ok: bool


class TrainRecord(Record):
    """One training run (train.json); steps.jsonl, believed.jsonl, observed.jsonl and periods.jsonl lie beside it."""

    name: str
    status: Status
    status_why: str | None = None
    model: str
    task: str
    method: str
    module: str
    options: dict[str, Any]
    seed: int
    recipe: dict[str, Any]
    recipe_changes: list[str]
    lr: float | None
    lr_searched: bool
    steps_done: int
    checkpoint: str | None = Field(description="model folder that plain transformers loads")
    checkpoint_why: str | None = None
    parameters: int | None
    trainable_parameters: int | None = Field(default=None, description="in one step")
    train_loss: float | None = Field(default=None, description="mean of the last 10 % of the steps")
    validation_loss: float | None = Field(
        default=None, description="mean nats per answer token, whole split, at the end"
    )
    clipped_share: float | None = None
    data: DataUse | None = None
    timing: Timing | None = None
    memory: Memory | None = None
    engagement: list[Check] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)
    provenance: Provenance


class Trial(Record):
    """One point of a learning-rate search."""

    lr: float
    seed: int
    status: Status
    status_why: str | None = None
    validation_loss: float | None
    extension: bool = Field(description="beyond the grid that the config gave")


class SearchRecord(Record):
    """A finished search (search.json)."""

    name: str
    model: str
    task: str
    method: str
    lr: float | None = Field(description="lowest mean validation loss over the search seeds")
    lr_why: str | None = None
    at_edge: bool = Field(description="the best is still an edge after all extensions")
    trials: list[Trial]
    wall_s: float
    provenance: Provenance


class SuiteScore(Record):
    """One suite of one run."""

    suite: str
    scoring: str
    protocol: str
    rows: int
    limited: bool = Field(description="not the whole test file")
    correct: int
    unparsed: int
    chance: float | None = Field(description="share a blind guess gets right; null where there is none")
    heldout_loss: float | None = Field(description="mean nats per answer token of the reference output")
    heldout_loss_why: str | None = None
    heldout_tokens: int
    truncated_rows: int
    leaked_rows: int = Field(description="test instructions that occur word for word in the training rows")


class EvalRecord(Record):
    """Scores of one run (eval/<name>.json); per-document outcomes lie beside it as parquet."""

    name: str
    run: str
    status: Literal["ok", "skipped"]
    status_why: str | None = None
    decoding: dict[str, Any]
    scores: list[SuiteScore]
    wall_s: float
    provenance: Provenance


# ---------------------------------------------------------------- flat rows: the columns of results/<study>/*.parquet

RUN_COLUMNS: dict[str, str] = {
    "run": "string", "model": "string", "task": "string", "method": "string", "module": "string", "seed": "Int64",
    "status": "string", "status_why": "string", "lr": "Float64", "lr_searched": "boolean", "recipe_changes": "string",
    "steps": "Int64", "parameters": "Int64", "trainable_parameters": "Int64", "train_loss": "Float64",
    "validation_loss": "Float64", "clipped_share": "Float64", "train_rows": "Int64", "truncated_rows": "Int64",
    "dropped_rows": "Int64", "train_s": "Float64", "prepare_s": "Float64", "step_median_s": "Float64",
    "step_p95_s": "Float64", "throughput_tokens_per_s": "Float64", "throughput_why": "string",
    "host_peak_bytes": "Int64", "device_allocated_peak_bytes": "Int64", "device_why": "string",
    "nvml_process_peak_bytes": "Int64", "nvml_why": "string", "state_peak_bytes": "Int64",
    "failed_checks": "string", "notes": "string", "stale": "boolean", "git_commit": "string", "platform": "string",
    "device": "string",
}  # fmt: skip
"""One row a run. `host_peak_bytes` and `device_allocated_peak_bytes` are maxima over the training phases."""

SCORE_COLUMNS: dict[str, str] = {
    "run": "string", "suite": "string", "scoring": "string", "protocol": "string", "rows": "Int64",
    "limited": "boolean", "correct": "Int64", "accuracy": "Float64", "unparsed_share": "Float64", "chance": "Float64",
    "heldout_loss": "Float64", "heldout_tokens": "Int64", "truncated_rows": "Int64", "leaked_rows": "Int64",
}  # fmt: skip
"""One row a run and suite; `accuracy` is a share, not a percentage."""

DOCUMENT_COLUMNS: dict[str, str] = {
    "run": "string", "suite": "string", "document": "Int64", "correct": "boolean", "parsed": "boolean",
    "prediction": "string", "gold": "string", "loss": "Float64", "tokens": "Int64",
}  # fmt: skip
"""One row a run, suite and test item; `loss` is the mean over the item's answer tokens."""

TRIAL_COLUMNS: dict[str, str] = {
    "search": "string", "model": "string", "task": "string", "method": "string", "lr": "Float64", "seed": "Int64",
    "status": "string", "validation_loss": "Float64", "extension": "boolean", "selected": "boolean",
    "at_edge": "boolean",
}  # fmt: skip
"""One row a trial of a learning-rate search."""

STEP_COLUMNS: dict[str, str] = {
    "run": "string", "step": "Int64", "loss": "Float64", "lr_factor": "Float64", "grad_norm": "Float64",
    "clipped": "boolean", "tokens": "Int64", "step_s": "Float64",
}  # fmt: skip
"""One row an optimizer step."""

BELIEVED_COLUMNS: dict[str, str] = {
    "run": "string", "step": "Int64", "layer": "Int64", "active": "boolean", "importance": "Float64",
    "probability": "Float64", "age_steps": "Int64",
}  # fmt: skip
"""What a layer-wise method believed, one row a layer: at step 0 and wherever anything but the age changed."""

OBSERVED_COLUMNS: dict[str, str] = {
    "run": "string", "step": "Int64", "layer": "Int64", "gradient_rms": "Float64", "validation_loss": "Float64",
}  # fmt: skip
"""What the observer probe saw after `step` optimizer steps: root mean square of the gradient entries of each decoder
layer's own weights on fixed validation rows, and the loss on those rows."""

FRAMES: dict[str, dict[str, str]] = {
    "runs": RUN_COLUMNS,
    "scores": SCORE_COLUMNS,
    "documents": DOCUMENT_COLUMNS,
    "trials": TRIAL_COLUMNS,
    "steps": STEP_COLUMNS,
    "believed": BELIEVED_COLUMNS,
    "observed": OBSERVED_COLUMNS,
}
"""The tables that `collect` writes as results/<study>/<name>.parquet; reports are made from these alone."""
