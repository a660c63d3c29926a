"""One record as flat rows of the tables: `harness.reporting.collecting` joins them."""

from __future__ import annotations

from typing import Any

from harness.records.code import PROBE, code_of
from harness.records.columns import ALL, STEP_COLUMNS
from harness.records.inputs import OverlapRecord
from harness.records.run import LmEvalScore, ProbeRecord, SearchRecord

KINDS_OF_OVERLAP = ("exact", "masked", "ngram")


def step_row(run: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row of the steps table; runs made before padding was counted have no total."""
    made = {"run": run, "total_tokens": None, **row}
    return {column: made[column] for column in STEP_COLUMNS}


def score_row(run: str, score: dict[str, Any]) -> dict[str, Any]:
    """A suite's score of a run."""
    rows = score["rows"]
    return {
        "run": run,
        **{key: score[key] for key in ("suite", "scoring", "protocol", "rows", "limited", "correct", "chance")},
        "accuracy": score["correct"] / rows if rows else None,
        "accuracy_normalised": None if score["correct_normalised"] is None else score["correct_normalised"] / rows,
        "unparsed_share": score["unparsed"] / rows if rows else None,
        **{key: score[key] for key in ("heldout_loss", "heldout_tokens", "truncated_rows", "leaked_rows")},
    }


def lm_eval_row(run: str, score: LmEvalScore) -> dict[str, Any]:
    """One metric of a task of lm-eval."""
    known = score.model_dump(exclude={"task", "value_why", "stderr_why"})
    return {"run": run, "lm_task": score.task, **known}


def believed_rows(run: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """What a method believed at one step, a row a layer."""
    layers = next((len(row[key]) for key in ("importance", "probability", "age_steps") if row[key] is not None), None)
    if layers is None:
        # a method without beliefs about layers: only its draws are known
        unknown = dict.fromkeys(("importance", "probability", "age_steps", "temperature"))
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
            "temperature": row.get("temperature"),  # runs made before it was logged have none
        }
        for layer in range(layers)
    ]


def observed_rows(run: str, row: dict[str, Any]) -> list[dict[str, Any]]:
    """What the observer saw at one step, a row a layer."""
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


def probe_row(probe: ProbeRecord) -> dict[str, Any]:
    """A probe of an untrained model."""
    data = probe.data
    return {
        "probe": probe.name,
        **{key: getattr(probe, key) for key in ("model", "task", "status", "status_why", "prompt", "max_length")},
        "batches": len(probe.batches),
        "batch_rows": probe.probes["rows"],
        "seed": probe.probes["seed"],
        "weight_dtype": probe.weight_dtype,
        **{key: data and getattr(data, key) for key in ("train_rows", "truncated_rows", "dropped_rows")},
        "wall_s": probe.wall_s,
        "stale": probe.provenance.source_sha256 != code_of(PROBE).sha256,
    }


def probed_rows(probe: ProbeRecord) -> list[dict[str, Any]]:
    """Its batches, a row a layer and kind of block."""
    if probe.layer_parameters is None or probe.parameters_by_kind is None:
        return []
    sizes = {ALL: probe.layer_parameters, **probe.parameters_by_kind}
    keys = {"probe": probe.name, "model": probe.model, "task": probe.task}
    return [
        keys
        | {"batch": number, "layer": layer, "kind": kind, "parameters": sizes[kind][layer], "gradient_rms": value}
        | {"loss": batch.loss, "tokens": batch.tokens, "label_tokens": batch.label_tokens}
        for number, batch in enumerate(probe.batches)
        for kind, values in {ALL: batch.gradient_rms, **batch.gradient_rms_by_kind}.items()
        for layer, value in enumerate(values)
        if sizes[kind][layer]
    ]


def overlap_rows(record: OverlapRecord) -> list[dict[str, Any]]:
    """A row a suite."""
    return [
        {"task": record.task, "suite": suite.suite, "items": suite.items, "train_rows": record.train_rows}
        | {kind: len(getattr(suite, kind)) for kind in KINDS_OF_OVERLAP}
        for suite in record.suites
    ]


def overlapping_rows(record: OverlapRecord) -> list[dict[str, Any]]:
    """A row an item that occurs in the training rows."""
    return [
        {"task": record.task, "suite": suite.suite, "document": document}
        | {kind: document in getattr(suite, kind) for kind in KINDS_OF_OVERLAP}
        for suite in record.suites
        for document in sorted(set().union(*(getattr(suite, kind) for kind in KINDS_OF_OVERLAP)))
    ]


def trial_rows(search: SearchRecord) -> list[dict[str, Any]]:
    """The trials of a search."""
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
