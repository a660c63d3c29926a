"""The records of what a study does: runs, searches, probes, forecasts and scores."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from harness.records.measured import GpuRecord, Memory, Timing, TransferRates
from harness.records.record import Provenance, Record

LM_EVAL_SAMPLES = ".lm-eval.parquet"
"""Suffix of the outcomes of lm-eval's own tasks by document, beside a run's scores."""

Status = Literal["ok", "oom", "diverged", "disengaged", "skipped"]


class RunForecast(Record):
    """Peak memory of a run's largest step, forecast before it starts (forecast.json)."""

    name: str
    longest_row_tokens: int
    peak_bytes: int | None = Field(description="live storages")
    peak_phase: str | None
    needed_bytes: int | None = Field(description="with fragments and a GPU's context")
    peak_why: str | None
    provenance: Provenance


class DataUse(Record):
    """What tokenising the rows of a run did to them."""

    train_rows: int
    truncated_rows: int = Field(description="cut at max_length; such a row has no end token")
    dropped_rows: int = Field(description="no answer token left after cutting")
    mean_tokens: float
    answer_tokens_share: float


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
    attention: str | None = Field(default=None, description="as it was computed: sdpa, or eager")
    attention_why: str | None = Field(default=None, description="why not sdpa")
    parameters: int | None
    trainable_parameters: int | None = Field(default=None, description="in one step")
    train_loss: float | None = Field(default=None, description="mean of the last 10 % of the steps")
    validation_loss: float | None = Field(
        default=None, description="mean nats per answer token, whole split, at the end"
    )
    validation_why: str | None = Field(default=None, description="why an `ok` run has no validation loss")
    clipped_share: float | None = None
    data: DataUse | None = None
    processes: int = Field(default=1, description="that trained it together, each with its share of every step's rows")
    rank_host_peak_bytes: list[int | None] = Field(default_factory=list, description="in training, by rank")
    rank_device_allocated_peak_bytes: list[int | None] = Field(default_factory=list, description="in training, by rank")
    timing: Timing | None = None
    memory: Memory | None = None
    gpu: GpuRecord | None = Field(default=None, description="as the driver describes it")
    gpu_why: str | None = None
    transfer: TransferRates | None = Field(default=None, description="measured when the run was over")
    transfer_why: str | None = None
    engagement: list[Check] = Field(default_factory=list)
    files_sha256: dict[str, str] = Field(
        default_factory=dict, description="of the logs and the exported model; empty in records older than this"
    )
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


class ProbedBatch(Record):
    """Gradients of the mean loss of one batch, reduced to root mean squares (r in the paper)."""

    loss: float | None = Field(description="mean nats per label token; null if it is not finite")
    tokens: int = Field(description="without padding")
    label_tokens: int
    gradient_rms: list[float | None] = Field(
        description="of all parameters of each decoder layer, lowest first; null if it is not finite"
    )
    gradient_rms_by_kind: dict[str, list[float | None]] = Field(
        description="of each layer's norms, and of each of its other blocks; null where a layer has no such block"
    )


class ProbeRecord(Record):
    """Importance of an untrained model's layers on one task (probe.json)."""

    name: str
    status: Literal["ok", "oom", "diverged", "skipped"]
    status_why: str | None = None
    model: str
    task: str
    probes: dict[str, Any]
    prompt: str
    max_length: int
    loss_on: str
    weight_dtype: str
    layer_parameters: list[int] | None = Field(description="of each decoder layer")
    parameters_by_kind: dict[str, list[int]] | None = Field(description="the same by block; 0 where there is none")
    data: DataUse | None = Field(description="of all rows of the task; the batches take some of them")
    batches: list[ProbedBatch]
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
    correct_normalised: int | None = Field(
        default=None, description="by likelihood per character of the answer; null where the model writes its answer"
    )
    unparsed: int
    chance: float | None = Field(description="share a blind guess gets right; null where there is none")
    heldout_loss: float | None = Field(description="mean nats per answer token of the reference output")
    heldout_loss_why: str | None = None
    heldout_tokens: int
    truncated_rows: int
    leaked_rows: int = Field(description="test instructions that occur word for word in the training rows")


class LmEvalScore(Record):
    """One metric of one task or group of a suite of kind lm-eval, as lm-eval gives it."""

    suite: str
    task: str = Field(description="of lm-eval; a group where it has an average of its own")
    metric: str
    filter: str = Field(description="what lm-eval did to the answer before the metric; none: nothing")
    value: float | None
    value_why: str | None = None
    stderr: float | None
    stderr_why: str | None = None
    higher_is_better: bool | None
    version: str = Field(description="of the task")
    num_fewshot: int | None
    chat_template: bool
    items: int
    limited: bool = Field(description="not all items of the task")


class EvalRecord(Record):
    """Scores of one run (eval/<name>.json); per-document outcomes lie beside it as parquet."""

    name: str
    run: str
    status: Literal["ok", "skipped", "oom"]
    status_why: str | None = None
    decoding: dict[str, Any]
    scores: list[SuiteScore]
    lm_eval: list[LmEvalScore] = Field(
        default_factory=list, description="suites of kind lm-eval, a protocol of its own"
    )
    files_sha256: dict[str, str] = Field(
        default_factory=dict, description="of the outcomes by document; empty in records older than this"
    )
    wall_s: float
    provenance: Provenance
