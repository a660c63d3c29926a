"""The flat rows that tables and figures are made from: columns of results/<study>/*.parquet, and their types."""

from __future__ import annotations

RUN_COLUMNS: dict[str, str] = {
    "run": "string", "model": "string", "task": "string", "method": "string", "module": "string", "seed": "Int64",
    "status": "string", "status_why": "string", "lr": "Float64", "lr_searched": "boolean", "recipe_changes": "string",
    "steps": "Int64", "parameters": "Int64", "trainable_parameters": "Int64", "train_loss": "Float64",
    "validation_loss": "Float64", "clipped_share": "Float64", "train_rows": "Int64", "truncated_rows": "Int64",
    "dropped_rows": "Int64", "train_s": "Float64", "prepare_s": "Float64", "step_median_s": "Float64",
    "step_p95_s": "Float64", "timed_steps": "Int64", "throughput_tokens_per_s": "Float64",
    "throughput_total_tokens_per_s": "Float64", "throughput_why": "string", "host_peak_bytes": "Int64",
    "host_pss_bytes": "Int64", "method_pinned_peak_bytes": "Int64", "device_allocated_peak_bytes": "Int64",
    "device_reserved_peak_bytes": "Int64", "device_why": "string", "alloc_retries": "Int64",
    "nvml_process_peak_bytes": "Int64", "nvml_why": "string", "nvml_device_delta_peak_bytes": "Int64",
    "nvml_delta_why": "string", "nvml_source": "string", "foreign_why": "string", "state_peak_bytes": "Int64",
    "failed_checks": "string", "notes": "string", "stale": "boolean", "git_commit": "string", "platform": "string",
    "device": "string",
}  # fmt: skip
"""One row a run. Bytes by phase are maxima over all phases but eval, which is no part of training."""

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
    "clipped": "boolean", "tokens": "Int64", "total_tokens": "Int64", "step_s": "Float64",
}  # fmt: skip
"""One row an optimizer step; `tokens` leaves padding out, `total_tokens` does not."""

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

ADDED: dict[str, tuple[str, ...]] = {
    "runs": (
        "timed_steps", "throughput_total_tokens_per_s", "host_pss_bytes", "method_pinned_peak_bytes",
        "device_reserved_peak_bytes", "alloc_retries", "nvml_device_delta_peak_bytes", "nvml_delta_why", "nvml_source",
        "foreign_why",
    ),
    "steps": ("total_tokens",),
}  # fmt: skip
"""Columns that tables published under results/published/ lack, by table: there they are read as null."""
