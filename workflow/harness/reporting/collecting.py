"""From records on disk to flat rows: the only place that knows both shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from harness.records.code import training
from harness.records.provenance import source_sha256
from harness.records.reading import read, read_jsonl
from harness.records.run import EVALUATION, EvalRecord, SearchRecord, TrainRecord, largest
from harness.reporting.frames import Frames, read_table, rows_to_frame
from harness.study.paths import Places
from harness.study.plan import Plan


def collect(plan: Plan, places: Places) -> Frames:
    """All records of a study as frames; every record is checked against its schema while it is read."""
    rows: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("runs", "scores", "trials", "steps", "believed", "observed")
    }
    documents: list[pd.DataFrame] = []
    for name in plan.runs:
        folder = places.run(name)
        record = read(folder / "train.json", TrainRecord)
        rows["runs"].append(_run_row(record))
        rows["steps"] += [_step_row(name, row) for row in _lines(folder / "steps.jsonl")]
        rows["believed"] += [r for row in _lines(folder / "believed.jsonl") for r in _believed_rows(name, row)]
        rows["observed"] += [r for row in _lines(folder / "observed.jsonl") for r in _observed_rows(name, row)]
        score_file = places.score(name, plan.eval_of[name])
        score = read(score_file, EvalRecord)
        rows["scores"] += [_score_row(name, suite.model_dump()) for suite in score.scores]
        if score.status == "ok":
            documents.append(read_table(score_file.with_suffix(".parquet")))
    for name in plan.searches:
        search = read(places.search(name) / "search.json", SearchRecord)
        rows["trials"] += _trial_rows(search)
    frames = {name: rows_to_frame(name, values) for name, values in rows.items()}
    joined = pd.concat(documents, ignore_index=True) if documents else pd.DataFrame()
    frames["documents"] = rows_to_frame("documents", joined.to_dict("records"))  # type: ignore[arg-type]
    return Frames(**frames)


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path) if path.exists() else []


def _run_row(record: TrainRecord) -> dict[str, Any]:
    timing, memory, data = record.timing, record.memory, record.data
    return {
        "run": record.name,
        "model": record.model,
        "task": record.task,
        "method": record.method,
        "module": record.module,
        "seed": record.seed,
        "status": record.status,
        "status_why": record.status_why,
        "lr": record.lr,
        "lr_searched": record.lr_searched,
        "recipe_changes": ", ".join(record.recipe_changes),
        "steps": record.steps_done,
        "parameters": record.parameters,
        "trainable_parameters": record.trainable_parameters,
        "train_loss": record.train_loss,
        "validation_loss": record.validation_loss,
        "clipped_share": record.clipped_share,
        "train_rows": data and data.train_rows,
        "truncated_rows": data and data.truncated_rows,
        "dropped_rows": data and data.dropped_rows,
        "train_s": timing and timing.train_s,
        "prepare_s": timing and timing.prepare_s,
        "step_median_s": timing and timing.step_median_s,
        "step_p95_s": timing and timing.step_p95_s,
        "timed_steps": timing and timing.timed_steps,
        "throughput_tokens_per_s": timing and timing.throughput_tokens_per_s,
        "throughput_total_tokens_per_s": timing and timing.throughput_total_tokens_per_s,
        "throughput_why": timing and timing.throughput_why,
        "host_peak_bytes": memory and largest(memory.host_peak_bytes, without=EVALUATION),
        "host_pss_bytes": memory and largest(memory.host_pss_bytes, without=EVALUATION),
        "method_pinned_peak_bytes": memory and memory.method_pinned_peak_bytes,
        "device_allocated_peak_bytes": memory and largest(memory.device_allocated_peak_bytes, without=EVALUATION),
        "device_reserved_peak_bytes": memory and largest(memory.device_reserved_peak_bytes, without=EVALUATION),
        "device_why": memory and memory.device_why,
        "alloc_retries": memory and memory.alloc_retries,
        "nvml_process_peak_bytes": memory and memory.nvml_process_peak_bytes,
        "nvml_why": memory and memory.nvml_why,
        "nvml_device_delta_peak_bytes": memory and memory.nvml_device_delta_peak_bytes,
        "nvml_delta_why": memory and memory.nvml_delta_why,
        "nvml_source": memory and memory.nvml_source,
        "foreign_why": memory and memory.foreign_why,
        "state_peak_bytes": memory and memory.state_peak_bytes,
        "failed_checks": "; ".join(check.name for check in record.engagement if not check.ok),
        "notes": "; ".join(record.notes),
        "stale": record.provenance.source_sha256 != source_sha256(training(record.module)),
        "git_commit": record.provenance.git_commit,
        "platform": record.provenance.platform,
        "device": record.provenance.device,
    }


def _step_row(run: str, row: dict[str, Any]) -> dict[str, Any]:
    """A run made before padding was counted has no total."""
    return {"run": run, "total_tokens": None, **row}


def _score_row(run: str, score: dict[str, Any]) -> dict[str, Any]:
    rows = score["rows"]
    return {
        "run": run,
        **{key: score[key] for key in ("suite", "scoring", "protocol", "rows", "limited", "correct", "chance")},
        "accuracy": score["correct"] / rows if rows else None,
        "unparsed_share": score["unparsed"] / rows if rows else None,
        **{key: score[key] for key in ("heldout_loss", "heldout_tokens", "truncated_rows", "leaked_rows")},
    }


def _believed_rows(run: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    layers = next((len(row[key]) for key in ("importance", "probability", "age_steps") if row[key] is not None), None)
    if layers is None:
        # a method that believes in no layer: only what it drew is known
        unknown = dict.fromkeys(("importance", "probability", "age_steps"))
        known = {"run": run, "step": row["step"], "active": True}
        return [{**known, "layer": layer, **unknown} for layer in row["active"]]
    return [
        {
            "run": run,
            "step": row["step"],
            "layer": layer,
            "active": layer in row["active"],
            "importance": row["importance"] and row["importance"][layer],
            "probability": row["probability"] and row["probability"][layer],
            "age_steps": row["age_steps"] and row["age_steps"][layer],
        }
        for layer in range(layers)
    ]


def _observed_rows(run: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "run": run,
            "step": row["step"],
            "layer": layer,
            "gradient_rms": value,
            "validation_loss": row["validation_loss"],
        }
        for layer, value in enumerate(row["gradient_rms"])
    ]


def _trial_rows(search: SearchRecord) -> list[dict[str, Any]]:
    return [
        {
            "search": search.name,
            "model": search.model,
            "task": search.task,
            "method": search.method,
            "lr": trial.lr,
            "seed": trial.seed,
            "status": trial.status,
            "validation_loss": trial.validation_loss,
            "extension": trial.extension,
            "selected": trial.lr == search.lr,
            "at_edge": search.at_edge,
        }
        for trial in search.trials
    ]
