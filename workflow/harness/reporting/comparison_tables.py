"""Compares some methods: scores, paired differences to the first of them, cost, learning rate."""

from __future__ import annotations

from typing import Any

from pandas import DataFrame

from harness.measuring.energy import COUNTS
from harness.records.units import MIB
from harness.reporting.frames import Frames
from harness.reporting.layout import VALIDATION, loss_cells, method_name, of_method, part, protocol
from harness.reporting.run_tables import efficiency_numbers, search_rule
from harness.reporting.score_tables import (
    ACCURACY,
    HELDOUT_LOSS,
    VERDICT_RULE,
    cell_numbers,
    cell_text,
    difference,
    scores_of,
)
from harness.reporting.stats import Difference, judge
from harness.reporting.table import UNKNOWN, Footnotes, Table, number, rate, signed
from harness.study.spec import Study


def comparison_table(frames: Frames, study: Study, label: str) -> Table:
    """One row a model, suite and method of `study.comparisons[label]`."""
    comparison, chosen, notes = study.comparisons[label], part(study, label), Footnotes()
    notes.add(comparison.reading)
    first, *others = chosen.methods
    scores = scores_of(frames, study, HELDOUT_LOSS)
    # likelihood and lm-eval have tables of their own
    shown_cells = [(task, suite) for task, suite in loss_cells(study) if protocol(study, task, suite) == "written"]
    raw: list[dict[str, Any]] = []
    display: list[dict[str, str]] = []
    for model in study.models:
        for task, suite in shown_cells:
            found = [difference(frames, (model, task), (other, first), suite, HELDOUT_LOSS) for other in others]
            judged: dict[str, Difference] = dict(zip(others, judge(found), strict=True))
            for method in chosen.methods:
                keys = {"model": model, "task": task, "suite": suite, "method": method}
                mine, runs = _of(frames, scores, keys)
                numbers = _numbers(mine, runs, judged.get(method))
                raw.append(keys | numbers)
                shown = keys | {"method": method_name(study, frames, method, notes)}
                display.append(shown | _text(mine, runs, numbers, judged.get(method), notes, suite))
    if any(row["energy_median_j_per_1000_tokens"] is not None for row in raw):
        for shown, row in zip(display, raw, strict=True):
            shown["J/1,000 tokens"] = number(row["energy_median_j_per_1000_tokens"], 2)
        notes.add(COUNTS)
    alike = [key for key in ("model", "task", "suite") if len({row[key] for row in display}) == 1]
    where = ", ".join(f"{key} {display[0][key]}" for key in alike)
    notes.add(f"Difference: held-out loss minus that of {first}, paired by seed and document. {VERDICT_RULE}")
    notes.add(f"Learning rate: {search_rule(study)}.")
    notes.add("Optimizer state and tokens/s are of training, as in the table of memory and throughput.")
    return Table(
        name=f"comparison_{label}",
        caption=f"{comparison.title}{f' ({where})' if where else ''}. Mean ± sample standard deviation over seeds "
        "(number of ok runs); in brackets unreadable answers, %.",
        raw=DataFrame(raw),
        display=DataFrame([{k: v for k, v in row.items() if k not in alike} for row in display]),
        footnotes=notes.lines(),
    )


def _numbers(scores: DataFrame, runs: DataFrame, result: Difference | None) -> dict[str, Any]:
    accuracy, loss = (cell_numbers(scores, runs, measure) for measure in (ACCURACY, HELDOUT_LOSS))
    ok = runs[runs["status"] == "ok"]
    cost = efficiency_numbers(ok, ok.iloc[:0])
    total = ok["parameters"].dropna()
    trained = cost["trainable_parameters"]
    rates = sorted({float(v) for v in ok["lr"].dropna()})
    return {
        **accuracy,
        **loss,
        "difference_nats_per_token": None if result is None else result.mean,
        "p_holm": None if result is None else result.p_holm,
        "verdict": None if result is None else result.verdict,
        "trainable_share": trained / float(total.max()) if trained is not None and len(total) else None,
        "state_peak_bytes": cost["state_peak_bytes"],
        "throughput_median_tokens_per_s": cost["throughput_median_tokens_per_s"],
        "energy_median_j_per_1000_tokens": cost["energy_median_j_per_1000_tokens"],
        "lr": rates[0] if len(rates) == 1 else None,
    }


def _text(
    scores: DataFrame,
    runs: DataFrame,
    numbers: dict[str, Any],
    result: Difference | None,
    notes: Footnotes,
    suite: str,
) -> dict[str, str]:
    share, state = numbers["trainable_share"], numbers["state_peak_bytes"]
    accuracy = (
        UNKNOWN + notes.mark("the task has no suite; the loss is that on its validation rows.")
        if suite == VALIDATION
        else cell_text(cell_numbers(scores, runs, ACCURACY), runs, ACCURACY, notes)
    )
    return {
        "accuracy (%)": accuracy,
        "held-out loss (nats/token)": cell_text(cell_numbers(scores, runs, HELDOUT_LOSS), runs, HELDOUT_LOSS, notes),
        "difference": "reference" if result is None else signed(result.mean, 4),
        "verdict": "" if result is None else result.verdict,
        "trainable (%)": number(None if share is None else 100 * share, 1),
        "state (MiB)": number(None if state is None else state / MIB, 2),
        "tokens/s": number(numbers["throughput_median_tokens_per_s"], 0),
        "lr": UNKNOWN if numbers["lr"] is None else rate(numbers["lr"]),
    }


def _of(frames: Frames, scores: DataFrame, keys: dict[str, str]) -> tuple[DataFrame, DataFrame]:
    at = (keys["model"], keys["task"], keys["method"])
    return of_method(scores[scores["suite"] == keys["suite"]], *at), of_method(frames.runs, *at)
