"""Tables of where importance lies: the claims, each task's probe, pairs of tasks, each layer, the drift."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

import numpy as np

from harness.reporting.claims import claims
from harness.reporting.drift import Drift, drifts
from harness.reporting.frames import Frames
from harness.reporting.importance_stats import Estimate
from harness.reporting.probe_table import NORM, interval_text, task_table
from harness.reporting.probed import ALIKE, SAMPLERS, SHARE, OfTask, Pair, compared, probed_tasks
from harness.reporting.stats import ALPHA, Array
from harness.reporting.table import UNKNOWN, Footnotes, Table, number, percent, table_of_rows
from harness.study.spec import Study

SAMPLED = (
    "Samplers: tau is the temperature of the plain softmax of the norms divided by their mean; auto finds the one at "
    f"which {percent(SHARE, 0)} of the layers are effective."
)


def importance_tables(frames: Frames, study: Study) -> list[Table]:
    """Every table that the study has something for: none without probes and without runs observed over training."""
    of_models = {model: probed_tasks(frames, study, model) for model in study.models}
    pairs = {model: compared(tasks) for model, tasks in of_models.items()}
    moving = drifts(frames, study)
    made: list[Table] = []
    if len(frames.probes) or moving:
        made.append(_claim_table(of_models, pairs, moving))
    if len(frames.probes):
        made += [task_table(frames, study, of_models), _pair_table(pairs), _layer_table(of_models)]
    if moving:
        made.append(_drift_table(moving))
    return made


# ---------------------------------------------------------------- claims


def _claim_table(
    of_models: Mapping[str, Mapping[str, OfTask]], pairs: Mapping[str, list[Pair]], moving: list[Drift]
) -> Table:
    notes = Footnotes()
    raw: list[dict[str, Any]] = []
    display: list[dict[str, str]] = []
    for model, tasks in of_models.items():
        for claim in claims(tasks, pairs[model], [drift for drift in moving if drift.model == model]):
            raw.append({"model": model, **vars(claim)})
            shown = {"model": model, "claim": claim.claim + notes.mark(claim.criterion)}
            display.append(shown | {"verdict": claim.verdict, "numbers": claim.numbers or UNKNOWN})
    notes.add(SAMPLED)
    return table_of_rows(
        "importance_claims",
        "Where importance lies: the paper's premise as claims that can fail. The criteria in the footnotes are ours.",
        raw,
        display,
        notes,
    )


# ---------------------------------------------------------------- pairs of tasks


def _pair_table(pairs: Mapping[str, list[Pair]]) -> Table:
    notes = Footnotes()
    raw: list[dict[str, Any]] = []
    display: list[dict[str, str]] = []
    for model, of_model in pairs.items():
        for pair in of_model:
            keys = {"model": model, "first": pair.first, "second": pair.second}
            raw.append(keys | _pair_numbers(pair))
            display.append({"model": model, "tasks": f"{pair.first}, {pair.second}"} | _pair_text(pair))
    notes.add(
        "Rank correlation: Spearman's, over layers, of the mean norms of all batches; 95 % interval over batches."
    )
    notes.add(
        "Halves of two tasks: the same of half of one task's batches and half of the other's, to be compared with the "
        "ceiling, that of two halves of one task's own batches (mean of both tasks). Means over random halves."
    )
    notes.add(
        "p: of both tasks having one order, by permutation of batches between them, after Holm's correction over the "
        f"model's pairs. Verdict: differ, p < 0.05; alike, else, with the whole interval above {ALIKE:g}."
    )
    notes.add(
        "Moved draws: share of single draws that go to other layers if the probe of the other task is used (total "
        f"variation distance), with 95 % interval; behind the semicolon the same between two halves of a task's own "
        f"batches, hence noise. {SAMPLED}"
    )
    return table_of_rows(
        "importance_pairs",
        "Does importance before training differ between tasks? Every pair of tasks.",
        raw,
        display,
        notes,
    )


def _pair_numbers(pair: Pair) -> dict[str, Any]:
    numbers: dict[str, Any] = {
        "rank_correlation": pair.rho.value,
        "rank_correlation_low": pair.rho.low,
        "rank_correlation_high": pair.rho.high,
        "halves_of_two_tasks": pair.halves,
        "ceiling": pair.ceiling,
        "p": pair.p,
        "p_holm": pair.p_holm,
        "verdict": pair.verdict,
    }
    for sampler, moved in pair.moved.items():
        key = f"moved_share_{sampler}"
        numbers |= {key: moved.value, f"{key}_low": moved.low, f"{key}_high": moved.high}
        numbers[f"{key}_of_one_task"] = pair.halves_moved[sampler]
    return numbers


def _pair_text(pair: Pair) -> dict[str, str]:
    shown = {
        "rank correlation": interval_text(pair.rho, 2),
        "halves of two tasks": number(pair.halves, 2),
        "ceiling": number(pair.ceiling, 2),
        "p (Holm)": f"{pair.p_holm:.4f}" if pair.p_holm < 0.01 else number(pair.p_holm, 2),
        "verdict": pair.verdict,
    }
    for sampler in SAMPLERS:
        moved = pair.moved[sampler.key]
        whole = Estimate(value=100 * moved.value, low=100 * moved.low, high=100 * moved.high)
        noise = number(100 * pair.halves_moved[sampler.key], 1)
        shown[f"moved draws, {sampler.name} (%)"] = f"{interval_text(whole, 1)}; {noise}"
    return shown


# ---------------------------------------------------------------- layers


def _layer_table(of_models: Mapping[str, Mapping[str, OfTask]]) -> Table:
    notes = Footnotes()
    raw: list[dict[str, Any]] = []
    display: list[dict[str, str]] = []
    names = list(dict.fromkeys(task for tasks in of_models.values() for task in tasks))
    for model, tasks in of_models.items():
        layers = max((task.norms.shape[1] for task in tasks.values()), default=0)
        for layer in range(layers):
            numbers = {name: _layer_numbers(task, layer) for name, task in tasks.items()}
            raw += [{"model": model, "layer": layer, "task": name} | values for name, values in numbers.items()]
            shown = {
                name: f"{number(values['relative'], 2)} ± {number(values['relative_sd'], 2)}"
                for name, values in numbers.items()
            }
            display.append({"model": model, "layer": str(layer)} | {name: shown.get(name, UNKNOWN) for name in names})
    notes.add(
        "± standard deviation over batches, each batch divided by its own mean over layers. Layer 0 is the lowest."
    )
    return table_of_rows(
        "importance_layers",
        f"Importance of every layer before training: mean norm ({NORM}) divided by its mean over layers.",
        raw,
        display,
        notes,
    )


def _layer_numbers(task: OfTask, layer: int) -> dict[str, float]:
    norms: Array = task.norms[:, layer]
    by_batch = norms / task.norms.mean(axis=1)
    return {
        "norm_mean": float(norms.mean()),
        "norm_sd": float(norms.std(ddof=1)),
        "relative": float(task.relative[layer]),
        "relative_sd": float(by_batch.std(ddof=1)),
    }


# ---------------------------------------------------------------- over training


def _drift_table(moving: list[Drift]) -> Table:
    notes = Footnotes()
    raw: list[dict[str, Any]] = []
    display: list[dict[str, str]] = []
    for drift in moving:
        noise = None if drift.noise is None else float(drift.noise.rho.mean())
        low = None if drift.noise is None else float(np.quantile(drift.noise.rho, ALPHA))
        keys = {"model": drift.model, "task": drift.task, "method": drift.method}
        last = int(drift.curves[0]["step"].iloc[-1])
        raw.append(
            keys
            | {"seeds": len(drift.last), "last_step": last, "rank_correlation_mean": fmean(drift.last)}
            | {"rank_correlation_lowest": min(drift.last), "rank_correlation_highest": max(drift.last)}
            | {f"moved_share_{sampler}_mean": fmean(values) for sampler, values in drift.moved.items()}
            | {"rows_rank_correlation_mean": noise, "rows_rank_correlation_5_percent": low}
            | {"rows": drift.noise and drift.noise.rows, "p": drift.p, "p_holm": drift.p_holm, "verdict": drift.verdict}
        )
        display.append(
            keys
            | {"seeds": str(len(drift.last)), "last step": str(last), "rank correlation": _spread(drift.last, 2)}
            | {f"moved draws, {s.name} (%)": _spread(drift.moved[s.key], 1, 100) for s in SAMPLERS}
            | {
                "two choices of rows": number(noise, 2)
                if noise is None
                else f"{number(noise, 2)} (5 %: {number(low, 2)})",
                "p (Holm)": UNKNOWN if drift.p_holm is None else number(drift.p_holm, 3),
                "verdict": drift.verdict,
            }
        )
    notes.add(
        "Rank correlation: Spearman's, over layers, of the observer's norms at the last step with those at step 0."
    )
    notes.add("Mean over the ok seeds, in brackets the lowest and the highest seed.")
    notes.add(f"Moved draws: share of single draws that go to other layers at the last step than at step 0. {SAMPLED}")
    notes.add(
        "Two choices of rows: the same between two disjoint sets of batches of the probe before training, with as many "
        "rows as the observer has or as the probe allows; mean, and the value that 5 % of choices lie below. p: share "
        "of choices as low as the seed that changed least, after Holm's correction over the model's methods and tasks."
    )
    return table_of_rows(
        "importance_drift",
        "Does importance change over training? The order of the layers at the last step beside that at step 0.",
        raw,
        display,
        notes,
    )


def _spread(values: list[float], digits: int, factor: float = 1.0) -> str:
    ends = (
        ""
        if len(values) == 1
        else f" ({number(factor * min(values), digits)} to {number(factor * max(values), digits)})"
    )
    return number(factor * fmean(values), digits) + ends
