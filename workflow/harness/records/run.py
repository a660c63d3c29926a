"""The records that jobs write: models, rows, runs, searches and scores.

Every number carries its unit in its key (`_bytes`, `_s`, `_share`, `_tokens`, ...). What is not known is null, with the
reason under the same key + `_why`; never 0, never a sentinel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION: Final = 1

EVALUATION = "eval"
"""The phase of a run that is not part of training: its memory does not count in a run's peaks."""

LM_EVAL_SAMPLES = ".lm-eval.parquet"
"""Suffix of the outcomes of lm-eval's own tasks by document, beside a run's scores."""

Status = Literal["ok", "oom", "diverged", "disengaged", "skipped"]


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


class RunForecast(Record):
    """Peak memory of a run's largest step, forecast before it starts (forecast.json)."""

    name: str
    longest_row_tokens: int
    peak_bytes: int | None = Field(description="live storages")
    peak_phase: str | None
    needed_bytes: int | None = Field(description="with fragments and a GPU's context")
    peak_why: str | None
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


class DataUse(Record):
    """What tokenising the rows of a run did to them."""

    train_rows: int
    truncated_rows: int = Field(description="cut at max_length; such a row has no end token")
    dropped_rows: int = Field(description="no answer token left after cutting")
    mean_tokens: float
    answer_tokens_share: float


def largest(by_phase: Mapping[str, int | None], *, without: str = "") -> int | None:
    """The highest peak over all phases except `without`; None where no peak is known."""
    known = [peak for phase, peak in by_phase.items() if peak is not None and phase != without]
    return max(known, default=None)


class Memory(Record):
    """Peaks by phase, in bytes. Phases: load, prepare (the probe), first_step, steady, eval, save.

    On a GPU the allocator's figures also have the parts of a step: forward, backward, update and resample. Resample is
    the update of a period's last step, if the method promises a period: the new draw happens inside that update and
    cannot be measured apart from it. A part's peak is taken over `watched_steps` steps only, a step's over all steps.
    """

    host_peak_bytes: dict[str, int | None] = Field(description="resident set, the kernel's high-water mark")
    host_peak_bytes_why: str | None = None
    host_pss_bytes: dict[str, int | None] = Field(
        default_factory=dict, description="proportional set as each phase first ended, and at the run's end: no peak"
    )
    host_pss_why: str | None = None
    cgroup_peak_bytes: int | None = Field(
        default=None, description="of the whole control group, page cache and neighbours included"
    )
    cgroup_peak_why: str | None = None
    method_pinned_peak_bytes: int | None = Field(
        default=None, description="page-locked host memory, counted by the method from its own buffers at period ends"
    )
    method_pinned_why: str | None = None
    torch_pinned_peak_bytes: int | None = Field(
        default=None, description="of torch's own pinned pool, since the process began, blocks rounded up by torch"
    )
    torch_pinned_why: str | None = None
    device_allocated_peak_bytes: dict[str, int | None]
    device_reserved_peak_bytes: dict[str, int | None]
    device_why: str | None = None
    reserved_to_allocated_ratio: float | None = Field(default=None, description="of the peaks of steady steps")
    watched_steps: int | None = Field(default=None, description="whose parts were told apart; null on the CPU")
    alloc_conf: str | None = Field(default=None, description="PYTORCH_ALLOC_CONF; empty where it is not set")
    alloc_retries: int | None = Field(default=None, description="times the allocator ran out and emptied its cache")
    nvml_process_peak_bytes: int | None
    nvml_device_peak_bytes: int | None = Field(description="of the whole card, neighbours included")
    nvml_why: str | None = None
    nvml_device_delta_peak_bytes: int | None = Field(
        default=None, description="the card's peak less what was in use before this process first touched it"
    )
    nvml_delta_why: str | None = None
    nvml_source: Literal["process", "device delta"] | None = Field(
        default=None, description="which of the two says what this process held; the process where both are known"
    )
    nvml_poll_s: float | None = Field(default=None, description="time between two samples")
    foreign_why: str | None = Field(
        default=None, description="what else was seen on the GPU: device memory and all times of the run are null"
    )
    state_peak_bytes: int | None = Field(
        description="live tensors at step ends that belong neither to the model nor to the harness"
    )


class Timing(Record):
    """Times by the harness's clock; the observer, checkpoints and saving are not included."""

    load_s: float
    prepare_s: float | None
    train_s: float | None = Field(description="sum of the steps")
    processor_s: float | None = Field(
        default=None, description="processor time of the steps, all threads of rank 0 together; null on a GPU"
    )
    waited_s: float | None = Field(
        default=None, description="time in the steps that a thread was ready to run and no processor was free"
    )
    warmup_steps: int = Field(description="steps before the first timed one, which begins a period of the method")
    timed_steps: int | None = Field(default=None, description="whole periods of the method only")
    step_median_s: float | None
    step_p95_s: float | None
    throughput_tokens_per_s: float | None = Field(
        description="non-padding tokens of the timed steps, all processes together"
    )
    throughput_total_tokens_per_s: float | None = Field(default=None, description="the same with padding")
    throughput_why: str | None = Field(default=None, description="also why any other time here is null")
    clock: Literal["perf_counter", "cuda events"] | None = None
    device_synchronised: bool
    prepare_energy_j: float | None = Field(
        default=None,
        description="of `prepare_s`; as every energy here by the driver's counter of whole cards, idle power included, "
        "the cards of all processes together; null in records older than this",
    )
    prepare_energy_why: str | None = None
    train_energy_j: float | None = Field(
        default=None, description="sum of the steps, with the harness's looks at the weights within them"
    )
    energy_j_per_1000_tokens: float | None = Field(
        default=None, description="of the timed steps: joules per 1,000 of the tokens that throughput counts"
    )
    energy_why: str | None = Field(default=None, description="why an energy of the steps is null")


class GpuState(Record):
    """The driver's readings at one moment."""

    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    power_limit_w: float | None
    throttle_reasons: list[str] | None
    pcie_generation: int | None = Field(description="of the link now: an idle link falls back to an older one")
    pcie_lanes: int | None
    unread_why: dict[str, str] = Field(default_factory=dict, description="why a figure here is null, by its key")


class GpuRecord(Record):
    """The card of a run, by NVML."""

    name: str | None
    uuid: str | None
    mig: bool | None = Field(description="a part of a card in MIG mode; clocks, power and link are the card's")
    total_bytes: int | None
    driver: str | None
    driver_cuda: str | None = Field(description="newest CUDA that the driver serves")
    torch_cuda: str | None = Field(description="CUDA that torch was built with")
    pcie_max_generation: int | None
    pcie_max_lanes: int | None
    unread_why: dict[str, str] = Field(default_factory=dict, description="why a figure here is null, by its key")
    before: GpuState
    after: GpuState
    throttle_reasons_during: list[str] | None = Field(description="all that were seen while the run was sampled")


class TransferRates(Record):
    """Copies between pinned host memory and the device."""

    copy_bytes: int = Field(description="size of one copy in one direction")
    host_to_device_bytes_per_s: float | None
    device_to_host_bytes_per_s: float | None
    both_ways_bytes_per_s: float | None = Field(description="sum of both directions, copied at the same time")
    rates_why: str | None = None


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
