"""The table of probes: one row a model and task, with what its batches say together and how far they lie apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pandas import DataFrame

from harness.records.columns import ALL, NORMS
from harness.reporting.claims import effective
from harness.reporting.frames import Frames
from harness.reporting.importance_stats import Estimate, temperatures_for
from harness.reporting.probed import PLAIN, SHARE, OfTask
from harness.reporting.stats import rank_correlation
from harness.reporting.table import UNKNOWN, Footnotes, Table, number, percent, table_of_rows
from harness.study.spec import Study

EXTREMES = 3
"""Layers named at either end of the order."""
CUT = 0.01
"""Share of truncated rows from which a footnote names it."""


NORM = "root mean square of the entries of the gradient of a batch's mean loss"
"""What a probe measures of each layer."""


def task_table(frames: Frames, study: Study, of_models: Mapping[str, Mapping[str, OfTask]]) -> Table:
    """One row a probe; one that did not end ok has its reason."""
    notes = Footnotes()
    raw: list[dict[str, Any]] = []
    display: list[dict[str, str]] = []
    for model, tasks in of_models.items():
        for task in study.tasks:
            probes = frames.probes[(frames.probes["model"] == model) & (frames.probes["task"] == task)]
            if probes.empty:
                continue
            keys = {"model": model, "task": task}
            probe = probes.iloc[0].to_dict()
            if task not in tasks:
                raw.append(keys | {"status": probe["status"]})
                display.append(keys | {"batches": str(probe["status"]) + notes.mark(str(probe["status_why"]))})
                continue
            numbers = _numbers(frames, keys, tasks[task])
            size = {"batches": int(probe["batches"]), "batch_rows": int(probe["batch_rows"])}
            raw.append(keys | {"status": "ok"} | size | numbers)
            shown = _text(numbers, size, tasks[task])
            if probe["stale"] is True:
                shown["batches"] += notes.mark("made by code that has changed since.")
            display.append(keys | shown)
    notes.add(f"Norm: {NORM}, without an update; mean over batches. Layer 0 is the lowest.")
    notes.add("Spread: standard deviation over batches divided by the mean, median over layers.")
    notes.add(
        "Two halves: rank correlation over layers between the means of two random halves of the task's own batches, "
        "mean over halves: no comparison of two tasks can be expected to give more."
    )
    notes.add(
        "Effective layers: exp of the entropy of the plain softmax of the norms divided by their mean, at the "
        "temperature given; in brackets the 95 % interval over batches. Last of them: the temperature at which "
        f"{percent(SHARE, 0)} of the layers are effective."
    )
    notes.add(
        "Squared norm by block: shares of the sum over all layers and batches. Order without norms: rank correlation "
        "over layers with the importance of the layers' matrices alone; norms are vectors with few and large gradients."
    )
    taken = frames.probes[frames.probes["status"] == "ok"]
    for row in taken.to_dict("records"):
        if row["train_rows"] and row["truncated_rows"] / row["train_rows"] > CUT:
            share = percent(row["truncated_rows"] / row["train_rows"], 0)
            notes.add(f"{row['task']}, {row['model']}: {share} of the rows are cut at {int(row['max_length'])} tokens.")
    settings = sorted({f"prompt {p}, rows cut at {n} tokens, {d} weights" for p, n, d in zip(
        frames.probes["prompt"], frames.probes["max_length"], frames.probes["weight_dtype"], strict=True
    )})  # fmt: skip
    return table_of_rows(
        "importance_by_task",
        f"Importance of the layers before training, by task ({'; '.join(settings)}).",
        raw,
        [{column: row.get(column, UNKNOWN) for column in _columns(display)} for row in display],
        notes,
    )


def _columns(rows: list[dict[str, str]]) -> list[str]:
    return list(dict.fromkeys(column for row in sorted(rows, key=len, reverse=True) for column in row))


def _numbers(frames: Frames, keys: Mapping[str, str], task: OfTask) -> dict[str, Any]:
    rows = frames.probed[(frames.probed["model"] == keys["model"]) & (frames.probed["task"] == keys["task"])]
    batches = rows.drop_duplicates("batch")
    order = [int(layer) for layer in np.argsort(task.relative)]
    numbers: dict[str, Any] = {
        "loss_nats_per_token": float((batches["loss"] * batches["label_tokens"]).sum() / batches["label_tokens"].sum()),
        "label_tokens_per_batch": float(batches["label_tokens"].mean()),
        "norm_mean": float(task.norms.mean()),
        "norm_spread": float(np.median(task.norms.std(axis=0, ddof=1) / task.norms.mean(axis=0))),
        "relative_lowest": float(task.relative.min()),
        "relative_highest": float(task.relative.max()),
        "highest_layers": " ".join(map(str, order[: -EXTREMES - 1 : -1])),
        "lowest_layers": " ".join(map(str, order[:EXTREMES])),
        "halves_rank_correlation": task.halves,
    }
    for sampler in PLAIN:
        found, key = effective(task, sampler), f"effective_layers_{sampler.key}"
        numbers |= {key: found.value, f"{key}_low": found.low, f"{key}_high": found.high}
    numbers[f"temperature_for_share_{SHARE:g}"] = float(temperatures_for(task.relative, SHARE))
    numbers["rank_correlation_without_norms"] = rank_correlation(list(task.relative), _matrices(rows))
    return numbers | {f"squared_norm_share_{kind}": share for kind, share in _shares(rows).items()}


def _matrices(rows: DataFrame) -> list[float]:
    """Mean over batches of each layer's root mean square without its norms."""
    parts = rows[(rows["kind"] != ALL) & (rows["kind"] != NORMS)]
    squares = (parts["gradient_rms"] ** 2 * parts["parameters"]).groupby([parts["batch"], parts["layer"]]).sum()
    sizes = parts["parameters"].groupby([parts["batch"], parts["layer"]]).sum()
    return [float(value) for value in ((squares / sizes) ** 0.5).groupby("layer").mean()]


def _shares(rows: DataFrame) -> dict[str, float]:
    """Share of the squared gradient norm in each kind of block."""
    parts = rows[rows["kind"] != ALL]
    squares = (parts["gradient_rms"] ** 2 * parts["parameters"]).groupby(parts["kind"]).sum()
    return {str(kind): float(value) for kind, value in (squares / squares.sum()).items()}


def _text(numbers: Mapping[str, Any], size: Mapping[str, int], task: OfTask) -> dict[str, str]:
    shown = {
        "batches": f"{size['batches']} × {size['batch_rows']}",
        "loss (nats/token)": number(numbers["loss_nats_per_token"], 2),
        "loss tokens a batch": number(numbers["label_tokens_per_batch"], 0),
        "mean norm": f"{numbers['norm_mean']:.2e}".replace("-", "−"),
        "spread": percent(numbers["norm_spread"], 0),
        "lowest to highest / mean": " to ".join(number(numbers[f"relative_{end}"], 2) for end in ("lowest", "highest")),
        "highest layers": numbers["highest_layers"],
        "lowest layers": numbers["lowest_layers"],
        "two halves": number(task.halves, 3),
    }
    for sampler in PLAIN:
        value, low, high = (numbers[f"effective_layers_{sampler.key}{end}"] for end in ("", "_low", "_high"))
        shown[f"effective layers, {sampler.name}"] = (
            f"{interval_text(Estimate(value=value, low=low, high=high), 1)} of {task.norms.shape[1]}"
        )
    shown[f"tau for {percent(SHARE, 0)}"] = number(numbers[f"temperature_for_share_{SHARE:g}"], 2)
    kinds = [key for key in numbers if key.startswith("squared_norm_share_")]
    shown["order without norms"] = number(numbers["rank_correlation_without_norms"], 2)
    return shown | {
        "squared norm by block": ", ".join(
            f"{key.removeprefix('squared_norm_share_')} {percent(numbers[key], 0)}" for key in kinds
        )
    }


def interval_text(found: Estimate, digits: int) -> str:
    """A value with its interval in brackets."""
    return f"{number(found.value, digits)} [{number(found.low, digits)}, {number(found.high, digits)}]"
