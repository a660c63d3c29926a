"""Columns, with their types, of results/<study>/*.parquet: the flat rows that tables and figures are made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.records.code import code_of, training
from harness.records.measured import EVALUATION, largest
from harness.records.run import Check, TrainRecord


@dataclass(frozen=True)
class Column:
    """A column of the runs' table: its type, and where its value is in a run's record."""

    dtype: str
    source: str
    """Path of the value in the record, null if a block on the way is null. Empty: the record itself."""
    made: Callable[[Any], Any] | None = None
    """Converts the record's value to the table's."""

    def of(self, record: TrainRecord) -> Any:
        """The value for one run."""
        value: Any = record
        for key in filter(None, self.source.split(".")):
            value = getattr(value, key)
            if value is None:
                return None
        return value if self.made is None else self.made(value)


def _peak(by_phase: Mapping[str, int | None]) -> int | None:
    """Highest value over the phases of training; evaluation does not count."""
    return largest(by_phase, without=EVALUATION)


def _failed(checks: Sequence[Check]) -> str:
    return "; ".join(check.name for check in checks if not check.ok)


def _is_stale(record: TrainRecord) -> bool:
    """Whether the record is stale: made by other code than today's."""
    return record.provenance.source_sha256 != code_of(training(record.module)).sha256


RUNS: dict[str, Column] = {
    "run": Column("string", "name"),
    "model": Column("string", "model"),
    "task": Column("string", "task"),
    "method": Column("string", "method"),
    "module": Column("string", "module"),
    "seed": Column("Int64", "seed"),
    "status": Column("string", "status"),
    "status_why": Column("string", "status_why"),
    "lr": Column("Float64", "lr"),
    "lr_searched": Column("boolean", "lr_searched"),
    "recipe_changes": Column("string", "recipe_changes", ", ".join),
    "steps": Column("Int64", "steps_done"),
    "parameters": Column("Int64", "parameters"),
    "trainable_parameters": Column("Int64", "trainable_parameters"),
    "train_loss": Column("Float64", "train_loss"),
    "validation_loss": Column("Float64", "validation_loss"),
    "clipped_share": Column("Float64", "clipped_share"),
    "processes": Column("Int64", "processes"),
    "train_rows": Column("Int64", "data.train_rows"),
    "truncated_rows": Column("Int64", "data.truncated_rows"),
    "dropped_rows": Column("Int64", "data.dropped_rows"),
    "train_s": Column("Float64", "timing.train_s"),
    "prepare_s": Column("Float64", "timing.prepare_s"),
    "step_median_s": Column("Float64", "timing.step_median_s"),
    "step_p95_s": Column("Float64", "timing.step_p95_s"),
    "timed_steps": Column("Int64", "timing.timed_steps"),
    "throughput_tokens_per_s": Column("Float64", "timing.throughput_tokens_per_s"),
    "throughput_total_tokens_per_s": Column("Float64", "timing.throughput_total_tokens_per_s"),
    "throughput_why": Column("string", "timing.throughput_why"),
    "train_energy_j": Column("Float64", "timing.train_energy_j"),
    "energy_j_per_1000_tokens": Column("Float64", "timing.energy_j_per_1000_tokens"),
    "energy_why": Column("string", "timing.energy_why"),
    "host_peak_bytes": Column("Int64", "memory.host_peak_bytes", _peak),
    "host_pss_bytes": Column("Int64", "memory.host_pss_bytes", _peak),
    "method_pinned_peak_bytes": Column("Int64", "memory.method_pinned_peak_bytes"),
    "device_allocated_peak_bytes": Column("Int64", "memory.device_allocated_peak_bytes", _peak),
    "device_reserved_peak_bytes": Column("Int64", "memory.device_reserved_peak_bytes", _peak),
    "device_why": Column("string", "memory.device_why"),
    "alloc_retries": Column("Int64", "memory.alloc_retries"),
    "nvml_process_peak_bytes": Column("Int64", "memory.nvml_process_peak_bytes"),
    "nvml_why": Column("string", "memory.nvml_why"),
    "nvml_device_delta_peak_bytes": Column("Int64", "memory.nvml_device_delta_peak_bytes"),
    "nvml_delta_why": Column("string", "memory.nvml_delta_why"),
    "nvml_source": Column("string", "memory.nvml_source"),
    "foreign_why": Column("string", "memory.foreign_why"),
    "state_peak_bytes": Column("Int64", "memory.state_peak_bytes"),
    "failed_checks": Column("string", "engagement", _failed),
    "notes": Column("string", "notes", "; ".join),
    "stale": Column("boolean", "", _is_stale),
    "git_commit": Column("string", "provenance.git_commit"),
    "git_dirty": Column("boolean", "provenance.git_dirty"),
    "platform": Column("string", "provenance.platform"),
    "device": Column("string", "provenance.device"),
}
"""One row a run. Bytes by phase are maxima over all phases except eval, which is not part of training."""

LEFT_OUT: dict[str, str] = {"empty_rows": "Int64", "overlapping_rows": "Int64"}
"""Further columns of the runs' table, from the manifest of the task's rows: rows that never entered the split into
training and validation, since they have no output, or since their text occurs in a test set."""

NOT_SCORED = "not scored: "
"""Beginning of the note on a run whose scoring ran out of memory."""

SCORE_COLUMNS: dict[str, str] = {
    "run": "string", "suite": "string", "scoring": "string", "protocol": "string", "rows": "Int64",
    "limited": "boolean", "correct": "Int64", "accuracy": "Float64", "accuracy_normalised": "Float64",
    "unparsed_share": "Float64", "chance": "Float64",
    "heldout_loss": "Float64", "heldout_tokens": "Int64", "truncated_rows": "Int64", "leaked_rows": "Int64",
}  # fmt: skip
"""One row a run and suite; `accuracy` is a share, not a percentage."""

DOCUMENT_COLUMNS: dict[str, str] = {
    "run": "string", "suite": "string", "document": "Int64", "correct": "boolean",
    "correct_normalised": "boolean", "parsed": "boolean",
    "prediction": "string", "gold": "string", "loss": "Float64", "tokens": "Int64",
}  # fmt: skip
"""One row a run, suite and test item; `loss` is the mean over the item's answer tokens."""

LM_EVAL_COLUMNS: dict[str, str] = {
    "run": "string", "suite": "string", "lm_task": "string", "metric": "string", "filter": "string",
    "value": "Float64", "stderr": "Float64", "higher_is_better": "boolean", "version": "string",
    "num_fewshot": "Int64", "chat_template": "boolean", "items": "Int64", "limited": "boolean",
}  # fmt: skip
"""One row a run and metric of a task or group of lm-eval; `value` and `stderr` as lm-eval gives them."""

LM_EVAL_DOCUMENT_COLUMNS: dict[str, str] = {
    "run": "string", "suite": "string", "lm_task": "string", "metric": "string", "filter": "string",
    "document": "Int64", "value": "Float64",
}  # fmt: skip
"""One row a run, metric and item of a task of lm-eval; null where the item has no number of its own."""

LM_EVAL_SAMPLE_COLUMNS = LM_EVAL_DOCUMENT_COLUMNS | {"target": "string", "answers": "string", "prompt_sha256": "string"}
"""The same as it lies beside a run's scores: with the right answer, the model's as JSON, and what it was asked."""

TRIAL_COLUMNS: dict[str, str] = {
    "search": "string", "model": "string", "task": "string", "method": "string", "lr": "Float64", "seed": "Int64",
    "status": "string", "validation_loss": "Float64", "extension": "boolean", "selected": "boolean",
    "at_edge": "boolean",
}  # fmt: skip
"""One row a trial of a learning-rate search."""

STEP_COLUMNS: dict[str, str] = {
    "run": "string", "step": "Int64", "loss": "Float64", "lr_factor": "Float64", "grad_norm": "Float64",
    "clipped": "boolean", "tokens": "Int64", "total_tokens": "Int64", "step_s": "Float64",
}  # fmt: skip
"""One row an optimizer step; `tokens` leaves padding out, `total_tokens` does not."""

BELIEVED_COLUMNS: dict[str, str] = {
    "run": "string", "step": "Int64", "layer": "Int64", "active": "boolean", "importance": "Float64",
    "probability": "Float64", "age_steps": "Int64", "temperature": "Float64",
}  # fmt: skip
"""What a layer-wise method believed, one row a layer: at step 0 and at each change of anything but the age."""

OBSERVED_COLUMNS: dict[str, str] = {
    "run": "string", "step": "Int64", "layer": "Int64", "gradient_rms": "Float64", "validation_loss": "Float64",
}  # fmt: skip
"""What the observer probe saw after `step` optimizer steps: root mean square of the gradient entries of each decoder
layer's own weights, mean over batches of fixed validation rows, and the loss on those rows. (In runs whose
observed.jsonl has no `batches`, it is that of the mean gradient over all batches.)"""

PROBE_COLUMNS: dict[str, str] = {
    "probe": "string", "model": "string", "task": "string", "status": "string", "status_why": "string",
    "batches": "Int64", "batch_rows": "Int64", "seed": "Int64", "prompt": "string", "max_length": "Int64",
    "weight_dtype": "string", "train_rows": "Int64", "truncated_rows": "Int64", "dropped_rows": "Int64",
    "wall_s": "Float64", "stale": "boolean",
}  # fmt: skip
"""One row a probe of an untrained model on a task; rows are counted over the whole task."""

ALL = "all"
"""`kind` of a layer as a whole."""
NORMS = "norm"
"""`kind` of all parameters in modules that hold vectors only: a layer's norms, and those of queries and keys."""

PROBED_COLUMNS: dict[str, str] = {
    "probe": "string", "model": "string", "task": "string", "batch": "Int64", "layer": "Int64", "kind": "string",
    "parameters": "Int64", "gradient_rms": "Float64", "loss": "Float64", "tokens": "Int64", "label_tokens": "Int64",
}  # fmt: skip
"""What a probe measured: one row a batch, layer and kind of block (`ALL`: the whole layer); loss and tokens are the
batch's."""

OVERLAP_COLUMNS: dict[str, str] = {
    "task": "string", "suite": "string", "items": "Int64", "train_rows": "Int64", "exact": "Int64", "masked": "Int64",
    "ngram": "Int64",
}  # fmt: skip
"""One row a task and suite: how many of its items occur in the task's training rows, by what counts as the same."""

OVERLAPPING_COLUMNS: dict[str, str] = {
    "task": "string", "suite": "string", "document": "Int64", "exact": "boolean", "masked": "boolean",
    "ngram": "boolean",
}  # fmt: skip
"""One row an item that does, by any of these; `document` as in `documents`."""

FRAMES: dict[str, dict[str, str]] = {
    "runs": {name: column.dtype for name, column in RUNS.items()} | LEFT_OUT,
    "scores": SCORE_COLUMNS,
    "documents": DOCUMENT_COLUMNS,
    "lm_eval": LM_EVAL_COLUMNS,
    "lm_eval_documents": LM_EVAL_DOCUMENT_COLUMNS,
    "trials": TRIAL_COLUMNS,
    "steps": STEP_COLUMNS,
    "believed": BELIEVED_COLUMNS,
    "observed": OBSERVED_COLUMNS,
    "probes": PROBE_COLUMNS,
    "probed": PROBED_COLUMNS,
    "overlaps": OVERLAP_COLUMNS,
    "overlapping": OVERLAPPING_COLUMNS,
}
"""The tables that `collect` writes as results/<study>/<name>.parquet; reports are made from these alone."""

ADDED: dict[str, tuple[str, ...]] = {
    "runs": (
        "timed_steps", "throughput_total_tokens_per_s", "host_pss_bytes", "method_pinned_peak_bytes",
        "device_reserved_peak_bytes", "alloc_retries", "nvml_device_delta_peak_bytes", "nvml_delta_why", "nvml_source",
        "foreign_why", "git_dirty", "processes", "train_energy_j", "energy_j_per_1000_tokens", "energy_why", *LEFT_OUT,
    ),
    "scores": ("accuracy_normalised",),
    "documents": ("correct_normalised",),
    "steps": ("total_tokens",),
    "believed": ("temperature",),
}  # fmt: skip
"""Columns that the tables under results/published/ lack, by table; they are read as null."""

ADDED_TABLES = ("lm_eval", "lm_eval_documents", "probes", "probed", "overlaps", "overlapping")
"""Tables that studies under results/published/ lack; they are read as empty."""
