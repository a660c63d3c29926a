"""Tables about the runs themselves: learning-rate choice, memory and throughput, and the outcome of every run."""

from __future__ import annotations

from typing import Any

import pandas as pd
from pandas import DataFrame

from harness.measuring.energy import COUNTS, OLDER
from harness.records.units import MIB
from harness.reporting.frames import Frames
from harness.reporting.layout import REFERENCE, groups, method_name, of_method, other_outcomes, trained, why
from harness.reporting.stats import median_or_none, summarise
from harness.reporting.table import UNKNOWN, Footnotes, Table, number, percent, rate
from harness.study.spec import Study


def learning_rate_table(frames: Frames, study: Study) -> Table:
    """The learning rate of every method, and the grid that it was chosen from."""
    notes = Footnotes()
    raw: list[dict[str, Any]] = []
    display: list[dict[str, str]] = []
    for model, task in groups(study):
        for method in trained(study):
            keys = {"model": model, "task": task, "method": method}
            trials = of_method(frames.trials, model, task, method)
            shown = keys | {"method": method_name(study, frames, method, notes)}
            if trials.empty:
                display.append(shown | _fixed_rate(of_method(frames.runs, model, task, method), notes))
                continue
            points = [_point(rows) | {"trials": len(rows)} for _, rows in trials.groupby("lr")]
            raw += [keys | point for point in points]
            display.append(shown | _choice_text(points, trials, notes))
    return Table(
        name="learning_rates",
        caption=f"Choice of the learning rate: {search_rule(study)}. Validation loss in nats per answer token.",
        raw=DataFrame(raw),
        display=DataFrame(display),
        footnotes=notes.lines(),
    )


def search_rule(study: Study) -> str:
    """How every method's learning rate was chosen, as part of a sentence."""
    search = study.search
    if search is None:
        return "every method was given its rate by the config"
    return (
        f"lowest mean validation loss over the search seeds {', '.join(map(str, search.seeds))}, which are none of "
        f"the study's; up to {search.max_extensions} points are added beyond an edge of the grid"
        + ("" if search.share == 1 else f"; a trial takes {percent(search.share, 0)} of a run's steps")
    )


def _point(rows: DataFrame) -> dict[str, Any]:
    usable = rows.loc[rows["status"] == "ok", "validation_loss"].dropna()
    summary = summarise([float(v) for v in usable])
    return {
        "lr": float(rows["lr"].iloc[0]),
        "extension": bool(rows["extension"].any()),
        "selected": bool(rows["selected"].any()),
        "at_edge": bool((rows["selected"] & rows["at_edge"]).any()),
        "ok_trials": summary.n,
        "validation_loss_mean_nats_per_token": summary.mean,
        "validation_loss_sd_nats_per_token": summary.sd,
    }


def _choice_text(points: list[dict[str, Any]], trials: DataFrame, notes: Footnotes) -> dict[str, str]:
    chosen = next((p for p in points if p["selected"]), None)
    lost = len(trials) - sum(p["ok_trials"] for p in points)
    total = str(len(trials))
    if lost:
        names = ", ".join(sorted(set(trials.loc[trials["status"] != "ok", "status"])))
        total += notes.mark(f"{lost} of these trials gave no loss ({names or 'loss missing'}).")
    grids = [", ".join(rate(p["lr"]) for p in points if p["extension"] is added) for added in (False, True)]
    if chosen is None:
        picked, edge = UNKNOWN + notes.mark("no trial gave a usable loss."), UNKNOWN
    else:
        picked, edge = rate(chosen["lr"]), "yes" if chosen["at_edge"] else "no"
        if chosen["at_edge"]:
            edge += notes.mark("the best rate may lie beyond the points tried.")
    loss = None if chosen is None else chosen["validation_loss_mean_nats_per_token"]
    return {
        "chosen": picked, "validation loss": number(loss, 4), "at edge": edge, "grid": grids[0],
        "extension": grids[1] or "none", "trials": total,
    }  # fmt: skip


def _fixed_rate(runs: DataFrame, notes: Footnotes) -> dict[str, str]:
    rates = sorted({float(v) for v in runs["lr"].dropna()})
    mark = notes.mark("given by the config, not searched." if rates else "not trained, or no run reached training.")
    chosen = ", ".join(rate(value) for value in rates) or UNKNOWN
    return {
        "chosen": chosen + mark, "validation loss": UNKNOWN, "at edge": UNKNOWN, "grid": UNKNOWN,
        "extension": UNKNOWN, "trials": "0",
    }  # fmt: skip


# ---------------------------------------------------------------- memory and throughput


OPTIONAL = {
    "step_p95_s": "step p95 (ms)",
    "throughput_total_median_tokens_per_s": "tokens/s with padding",
    "host_pss_bytes": "host PSS (MiB)",
    "method_pinned_peak_bytes": "pinned by the method (MiB)",
    "device_reserved_peak_bytes": "device reserved (MiB)",
    "nvml_device_delta_peak_bytes": "device delta (MiB)",
}
"""Columns shown only where some method of the study has a figure above 0 for them; the csv always has them."""


def efficiency_table(frames: Frames, study: Study) -> Table:
    """Memory (largest of the ok seeds) and throughput (median of the ok seeds) of training."""
    notes = Footnotes()
    raw: list[dict[str, Any]] = []
    display: list[dict[str, str]] = []
    for model, task in groups(study):
        for method in trained(study):
            runs = of_method(frames.ok_runs(), model, task, method)
            everything = of_method(frames.runs, model, task, method)
            numbers = {"ok_runs": len(runs), **efficiency_numbers(runs, _reference_runs(frames, study, model, task))}
            raw.append({"model": model, "task": task, "method": method} | numbers)
            shown = {"model": model, "task": task, "method": method_name(study, frames, method, notes)}
            display.append(shown | _efficiency_text(numbers, runs, everything, notes))
    known = [title for key, title in OPTIONAL.items() if any(numbers[key] for numbers in raw)]
    for numbers, row in zip(raw, display, strict=True):
        row |= {title: text for title, text in _optional_text(numbers).items() if title in known}
    notes.add(
        "Throughput: non-padding tokens, warm-up steps left out and whole periods of the method only, median over the "
        "ok runs (each run's own figure is in runs.parquet). The ratio is to full fine-tuning of the same model and "
        "task in this study, and is left out where the two ran on different machines."
    )
    notes.add(f"{COUNTS} Per 1,000 of the tokens that throughput counts, median over the ok runs.")
    notes.add(
        "Optimizer state: largest sum of live tensors at step ends that belong neither to the model nor to the "
        "harness, moments that sleep in host memory included. Memory is the largest of the ok runs."
    )
    if "device delta (MiB)" in known:
        notes.add(
            "Device delta: the card's peak less what was in use before the run; it stands for the process where the "
            "driver does not list it, and is no measure beside it."
        )
    return Table(
        name="efficiency",
        caption="Memory and throughput of training; 1 MiB is 1,048,576 bytes.",
        raw=DataFrame(raw),
        display=DataFrame(display),
        footnotes=notes.lines(),
    )


def _reference_runs(frames: Frames, study: Study, model: str, task: str) -> DataFrame:
    labels = [label for label, entry in study.methods.items() if entry.module == REFERENCE]
    runs = frames.ok_runs()
    return of_method(runs, model, task, labels[0]) if labels else runs.iloc[:0]


def efficiency_numbers(runs: DataFrame, reference: DataFrame) -> dict[str, Any]:
    """Memory and throughput of one method; ratios are to the `reference` runs."""

    def largest(column: str) -> int | None:
        known = runs[column].dropna()
        return int(known.max()) if len(known) else None

    speed, base = (median_or_none(rows["throughput_tokens_per_s"].dropna()) for rows in (runs, reference))
    machines = set(zip(runs["platform"], runs["device"], strict=True))
    machines |= set(zip(reference["platform"], reference["device"], strict=True))
    comparable = speed is not None and base is not None and len(machines) == 1
    return {
        "trainable_parameters": largest("trainable_parameters"),
        "state_peak_bytes": largest("state_peak_bytes"),
        "host_peak_bytes": largest("host_peak_bytes"),
        "device_allocated_peak_bytes": largest("device_allocated_peak_bytes"),
        "device_reserved_peak_bytes": largest("device_reserved_peak_bytes"),
        "nvml_process_peak_bytes": largest("nvml_process_peak_bytes"),
        "nvml_device_delta_peak_bytes": largest("nvml_device_delta_peak_bytes"),
        "host_pss_bytes": largest("host_pss_bytes"),
        "method_pinned_peak_bytes": largest("method_pinned_peak_bytes"),
        "alloc_retries": largest("alloc_retries"),
        "runs_beside_a_foreign_process": int(runs["foreign_why"].notna().sum()),
        "step_p95_s": median_or_none(runs["step_p95_s"].dropna()),
        "throughput_total_median_tokens_per_s": median_or_none(runs["throughput_total_tokens_per_s"].dropna()),
        "throughput_median_tokens_per_s": speed,
        "energy_median_j_per_1000_tokens": median_or_none(runs["energy_j_per_1000_tokens"].dropna()),
        "throughput_ratio_to_full": speed / base if comparable and speed and base else None,
        "clipped_mean_share": summarise([float(v) for v in runs["clipped_share"].dropna()]).mean,
    }


def _efficiency_text(
    numbers: dict[str, Any], runs: DataFrame, everything: DataFrame, notes: Footnotes
) -> dict[str, str]:
    def dash(*columns: str) -> str:
        if runs.empty:
            return UNKNOWN
        reasons = (
            {why(*(row[c] for c in columns)) for row in runs[list(columns)].to_dict("records")}
            if columns
            else {"not measured; the run's train.json may say why."}
        )
        return UNKNOWN + notes.mark("; ".join(sorted(reasons)))

    def mebibytes(key: str, *columns: str) -> str:
        value = numbers[key]
        return dash(*columns) if value is None else number(value / MIB, 1)

    def ratio_text() -> str:
        value = numbers["throughput_ratio_to_full"]
        if value is None and speed is not None:
            return UNKNOWN + notes.mark("no ok run of full fine-tuning on the same kind of machine.")
        return number(value, 2)

    def speed_text() -> str:
        text = dash("throughput_why") if speed is None else number(speed, 0)
        if numbers["alloc_retries"]:
            text += notes.mark("the allocator ran out of memory and emptied its cache: the time is not comparable.")
        return text

    def energy_text() -> str:
        value = numbers["energy_median_j_per_1000_tokens"]
        if value is not None or runs.empty:
            return number(value, 2)
        return UNKNOWN + notes.mark("; ".join(sorted({why(text, OLDER) for text in runs["energy_why"]})))

    outcomes = other_outcomes(everything, notes)
    shared = sorted(set(runs["foreign_why"].dropna()))
    beside = (
        f"{numbers['runs_beside_a_foreign_process']} not alone"
        + notes.mark(f"such runs count in no figure of device memory or speed: {'; '.join(shared)}.")
        if shared
        else ""
    )
    trainable, speed = numbers["trainable_parameters"], numbers["throughput_median_tokens_per_s"]
    clipped = numbers["clipped_mean_share"]
    return {
        "ok runs": "; ".join(filter(None, [str(len(runs)), beside, outcomes])),
        "trainable parameters": dash() if trainable is None else f"{trainable:,}",
        "optimizer state (MiB)": mebibytes("state_peak_bytes"),
        "host peak (MiB)": mebibytes("host_peak_bytes"),
        "device allocated (MiB)": mebibytes("device_allocated_peak_bytes", "device_why"),
        "device process (MiB)": mebibytes("nvml_process_peak_bytes", "nvml_why"),
        "tokens/s": speed_text(),
        "ratio to full": ratio_text(),
        "J/1,000 tokens": energy_text(),
        "clipped steps (%)": dash() if clipped is None else number(100 * clipped, 1),
    }


def _optional_text(numbers: dict[str, Any]) -> dict[str, str]:
    def shown(key: str) -> str:
        value = numbers[key]
        if value is None:
            return UNKNOWN
        if key.endswith("_bytes"):
            return number(value / MIB, 1)
        return number(1000 * value, 1) if key == "step_p95_s" else number(value, 0)

    return {title: shown(key) for key, title in OPTIONAL.items()}


# ---------------------------------------------------------------- every run


def run_table(frames: Frames, study: Study) -> Table:
    """Every run with its outcome; nothing is left out."""
    notes = Footnotes()
    columns = [
        "run", "model", "task", "method", "seed", "status", "status_why", "failed_checks", "notes", "lr", "lr_searched",
        "recipe_changes", "steps", "train_loss", "validation_loss", "train_rows", "truncated_rows", "dropped_rows",
        "empty_rows", "overlapping_rows", "prepare_s", "train_s", "stale", "git_commit", "git_dirty", "platform",
        "device",
    ]  # fmt: skip
    order = {name: i for names in (study.models, study.tasks, study.methods) for i, name in enumerate(names)}
    runs = frames.runs.sort_values(
        ["model", "task", "method", "seed"], key=lambda s: s if s.name == "seed" else s.map(order)
    )
    machines = elsewhere(runs)
    display = [
        {
            "model": str(row["model"]), "task": str(row["task"]),
            "method": method_name(study, frames, str(row["method"]), notes),
            "seed": str(row["seed"]), "status": str(row["status"]),
            "reason": "" if row["status"] == "ok" else why(row["status_why"]),
            "failed checks": _or_dash(row["failed_checks"]), "lr": _lr(row, notes),
            "validation loss": UNKNOWN if pd.isna(row["validation_loss"]) else number(float(row["validation_loss"]), 4),
            "notes": _or_dash(row["notes"]),
            "rows trained on": _count(row["train_rows"]), "of these cut": _count(row["truncated_rows"]),
            "rows dropped": _count(row["dropped_rows"]),
            "stale": UNKNOWN if pd.isna(row["stale"]) else "yes" if row["stale"] else "no",
            "id": str(row["run"]).rsplit("--", 1)[-1] + _origin_marks(row, machines, notes),
        }
        for row in runs.to_dict("records")
    ]  # fmt: skip
    notes.add(
        "Rows cut: longer than the recipe's max_length; rows dropped: no token of their answer was left. "
        "stale: the code that made the record has changed since. id: first 8 digits of the resolved spec's sha256."
    )
    for task in study.tasks:
        counts = runs[runs["task"] == task][["empty_rows", "overlapping_rows"]].max().fillna(0)
        left_out = {
            "had no output": int(counts["empty_rows"]),
            "occur in a file named by `without`, numbers apart": int(counts["overlapping_rows"]),
        }
        if any(left_out.values()):
            listed = " and ".join(f"{count:,} that {why}" for why, count in left_out.items() if count)
            notes.add(f"{task}: left out before the split into training and validation rows: {listed}.")
    return Table(
        name="runs",
        caption="Every run of the study with its outcome. Only runs with status ok count in any average.",
        raw=runs[columns],
        display=DataFrame(display),
        footnotes=notes.lines(),
    )


def elsewhere(runs: DataFrame) -> dict[str, str]:
    """The machine of each run that was not made where most were, by run."""
    known = runs.dropna(subset=["platform", "device"])
    machines = dict(zip(known["run"], known["platform"] + ", " + known["device"], strict=True))
    most = max(sorted(set(machines.values())), key=list(machines.values()).count, default="")
    return {run: machine for run, machine in machines.items() if machine != most}


def _origin_marks(row: dict[Any, Any], machines: dict[str, str], notes: Footnotes) -> str:
    """Marks of a run that counts like any other, and whose origin a reader has to know."""
    marks = ""
    if not pd.isna(row["git_dirty"]) and row["git_dirty"]:
        marks += notes.mark("made by code with changes that were not committed.")
    if row["run"] in machines:
        marks += notes.mark(f"made on another machine than most runs here: {machines[row['run']]}.")
    return marks


def _count(value: Any) -> str:
    return UNKNOWN if pd.isna(value) else f"{int(value):,}"


def _or_dash(value: Any) -> str:
    return value if isinstance(value, str) and value else "none"


def _lr(row: dict[Any, Any], notes: Footnotes) -> str:
    if pd.isna(row["lr"]):
        return UNKNOWN
    return rate(float(row["lr"])) + ("" if row["lr_searched"] else notes.mark("given by the config, not searched."))
