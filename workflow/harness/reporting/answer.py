"""The study's question, answered in sentences computed from its tables: does it help, how much, how sure, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np
from pandas import DataFrame

from harness.reporting.frames import Frames
from harness.reporting.layout import groups, of_method
from harness.reporting.score_tables import ACCURACY, HELDOUT_LOSS, LIKELIHOOD, Measure
from harness.reporting.stats import (
    Difference,
    Pairs,
    agreement,
    effective_layers,
    judge,
    layer_matrix,
    pair_documents,
    paired_difference,
    rank_correlation,
)
from harness.reporting.table import Footnotes, Table, signed
from harness.study.spec import Question, Study


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the page prints at its head, beside the table `answer`."""

    ask: str
    short: str
    """One sentence: yes, no, or that the study cannot tell."""
    reasons: tuple[str, ...]
    """What the sampler did, from the records of the runs."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How a difference is displayed."""

    unit: str
    factor: float
    digits: int


_POINTS = Scale(unit="points", factor=100, digits=1)
_NATS = Scale(unit="nats per token", factor=1, digits=4)
_MEASURES = {"accuracy": ACCURACY, "accuracy by likelihood": LIKELIHOOD, "held-out loss": HELDOUT_LOSS}


@dataclass(frozen=True, kw_only=True)
class _Finding:
    """One comparison of the method with one control."""

    model: str
    task: str
    measure: str
    control: str
    scale: Scale
    higher_is_better: bool
    result: Difference


def answer(frames: Frames, study: Study) -> Answer | None:
    """The answer to `study.question`; None if the study asks none."""
    asked = study.question
    if asked is None:
        return None
    return Answer(
        ask=asked.ask,
        short=_short(asked, _findings(frames, study, asked)),
        reasons=tuple(text for model, task in groups(study) for text in _reasons(frames, asked, model, task)),
    )


def answer_table(frames: Frames, study: Study, asked: Question) -> Table:
    """By how much, and how sure: one row a model, task, measure and control."""
    raw: list[dict[str, Any]] = []
    display: list[dict[str, str]] = []
    for found in _findings(frames, study, asked):
        result, low_high = found.result, _interval(found.result)
        keys = {"model": found.model, "task": found.task, "measure": found.measure, "control": found.control}
        ends = low_high or (None, None)
        raw.append(
            keys
            | {"unit": found.scale.unit, "difference": _scaled(result.mean, found), "low": _scaled(ends[0], found)}
            | {"high": _scaled(ends[1], found), "p_holm": result.p_holm, "seeds": result.seeds}
            | {"items": result.documents, "verdict": result.verdict}
        )
        shown = [signed(_scaled(value, found), found.scale.digits) for value in (result.mean, *ends)]
        display.append(
            keys
            | {"difference": shown[0] if result.mean is None else f"{shown[0]} {found.scale.unit}"}
            | {"95 % interval": shown[1] if low_high is None else f"{shown[1]} to {shown[2]}"}
            | {"seeds × items": f"{result.seeds} × {result.documents}" if result.seeds else "none"}
            | {"verdict": result.verdict}
        )
    notes = Footnotes()
    for control, isolates in asked.controls.items():
        notes.add(f"{control}: {isolates}.")
    notes.add(
        "Items of all suites of a task count alike. The interval is the hull of the bootstrap's and the t interval, "
        "since a claim needs both; Holm's correction runs over all rows of this table. "
        "Validation loss: whole runs are compared."
    )
    return Table(
        name="answer",
        caption=f"{asked.ask} {asked.method} minus each control, paired by seed and item.",
        raw=DataFrame(raw), display=DataFrame(display), footnotes=notes.lines(),
    )  # fmt: skip


# ---------------------------------------------------------------- how much, and how sure


def _findings(frames: Frames, study: Study, asked: Question) -> list[_Finding]:
    """Every comparison of the study, corrected as one family."""
    found: list[_Finding] = []
    for model, task in groups(study):
        for control in asked.controls:
            at, both = {"model": model, "task": task, "control": control}, (asked.method, control)
            for name, measure in _MEASURES.items():
                suites = [s for of, s in measure.cells(study) if of == task and s in study.tasks[task].suites]
                if suites:
                    pairs = _pooled(frames, (model, task), both, suites, measure)
                    share = measure.is_share
                    scale = _POINTS if share else _NATS
                    result = paired_difference(pairs)
                    found.append(_Finding(**at, measure=name, scale=scale, higher_is_better=share, result=result))
            result = paired_difference(_validation(frames, (model, task), both))
            found.append(_Finding(**at, measure="validation loss", scale=_NATS, higher_is_better=False, result=result))
    judged = judge([finding.result for finding in found])
    return [replace(finding, result=result) for finding, result in zip(found, judged, strict=True)]


def _scaled(value: float | None, found: _Finding) -> float | None:
    return None if value is None else value * found.scale.factor


def _pooled(
    frames: Frames, at: tuple[str, str], pair: tuple[str, str], suites: Sequence[str], measure: Measure
) -> Pairs:
    """The documents of several suites side by side, so that every item weighs the same."""
    first, second = (_by_seed(of_method(frames.ok_runs(), *at, method)) for method in pair)
    scored = [set(frames.scores.loc[frames.scores["suite"] == suite, "run"]) for suite in suites]
    everywhere = set.intersection(*scored)
    kept = [{seed: run for seed, run in runs.items() if run in everywhere} for runs in (first, second)]
    parts = [
        pair_documents(
            frames.documents, first=kept[0], second=kept[1], suite=suite, value=measure.document_column
        )
        for suite in suites
    ]  # fmt: skip
    return Pairs(
        first=np.concatenate([part.first for part in parts], axis=1),
        second=np.concatenate([part.second for part in parts], axis=1),
        weights=np.concatenate([part.weights for part in parts]),
    )


def _validation(frames: Frames, at: tuple[str, str], pair: tuple[str, str]) -> Pairs:
    """The validation loss of whole runs: one document, since single rows of it are not kept."""
    of_runs = [of_method(frames.ok_runs(), *at, method).dropna(subset=["validation_loss"]) for method in pair]
    losses = [dict(zip(map(int, runs["seed"]), map(float, runs["validation_loss"]), strict=True)) for runs in of_runs]
    seeds = sorted(losses[0].keys() & losses[1].keys())
    first, second = (np.array([[each[seed]] for seed in seeds]).reshape(len(seeds), 1) for each in losses)
    return Pairs(first=first, second=second, weights=np.ones(1))


def _by_seed(runs: DataFrame) -> dict[int, str]:
    return dict(zip(map(int, runs["seed"]), map(str, runs["run"]), strict=True))


def _interval(result: Difference) -> tuple[float, float] | None:
    """The hull of both intervals: a claim needs both, so this is what the study can exclude."""
    ends = [interval for interval in (result.bootstrap, result.seed_t) if interval is not None]
    return (min(low for low, _ in ends), max(high for _, high in ends)) if ends else None


def _short(asked: Question, found: Sequence[_Finding]) -> str:
    """Judged by the first control, which isolates what is asked; without its runs the next one is told."""
    known = {finding.control for finding in found if finding.result.mean is not None}
    first = next(iter(asked.controls))
    instead = next((control for control in asked.controls if control in known), first)
    judged = _judged(asked, [finding for finding in found if finding.control == instead], instead)
    if instead == first:
        return judged
    judged = judged.removeprefix("Cannot tell: ")
    return f"Cannot tell: no finished runs to compare {_against(asked, first)}. {judged[0].upper()}{judged[1:]}"


def _against(asked: Question, control: str) -> str:
    return f"against {control} ({asked.controls[control]})"


def _judged(asked: Question, mine: Sequence[_Finding], control: str) -> str:
    claimed = [finding for finding in mine if finding.result.verdict in {"higher", "lower"}]
    good = [f for f in claimed if (f.result.verdict == "higher") == f.higher_is_better]
    bad = [f for f in claimed if (f.result.verdict == "higher") != f.higher_is_better]
    against = _against(asked, control)
    if good and bad:
        return f"Both: {against}, better in {_named(good)}; worse in {_named(bad)}."
    if good:
        return f"Yes, {against}: better in {_named(good)}; no claim in the other {len(mine) - len(good)} comparisons."
    if bad:
        return f"No, {against}: worse in {_named(bad)}; no claim in the other {len(mine) - len(bad)} comparisons."
    if not any(finding.result.mean is not None for finding in mine):
        return f"Cannot tell: there are no finished runs to compare {against}."
    known = sum(finding.result.mean is not None for finding in mine)
    return f"Cannot tell: {against}, none of {known} comparisons shows a difference that this study can claim."


def _named(found: Sequence[_Finding]) -> str:
    return ", ".join(f"{finding.measure} of {finding.task} ({finding.model})" for finding in found)


# ---------------------------------------------------------------- why


def _reasons(frames: Frames, asked: Question, model: str, task: str) -> list[str]:
    """What the adaptive method believed and drew, beside what the observer probe saw."""
    runs = list(map(str, of_method(frames.ok_runs(), model, task, asked.method)["run"]))
    facts = [_facts(frames.believed_by(run), frames.observed_by(run)) for run in runs]
    where = f"{task} ({model}), {asked.method}, mean over {len(runs)} seed{'s' * (len(runs) != 1)}"
    sentences = []
    for key, text in _SENTENCES.items():
        known = [fact[key] for fact in facts if fact.get(key) is not None]
        if known:
            sentences.append(f"{where}: {text.format(*np.mean(np.array(known, dtype=np.float64), axis=0))}.")
    return sentences


_SENTENCES = {
    "effective": "the draws were made from {0:.1f} effective layers of {1:.0f}, {2:.0f} of them active at a time",
    "drawn": "the layer drawn most trained in {0:.0f} % of the periods, the one drawn least in {1:.0f} %",
    "spread": "on the observer's fixed rows the largest true gradient norm of a layer was {0:.1f} times the smallest",
    "agreement": "rank correlation of believed and true importance over layers {0:.2f}",
    "drift": "rank correlation of the true importance before training with that after it {0:.2f}",
}


def _facts(believed: DataFrame, observed: DataFrame) -> dict[str, tuple[float, ...] | None]:
    found: dict[str, tuple[float, ...] | None] = {}
    if len(believed):
        probability: Any = layer_matrix(believed, "probability").dropna()
        drawn = believed.assign(active=believed["active"].astype("Float64"))
        active: Any = layer_matrix(drawn, "active")
        if len(probability):
            effective = fmean(effective_layers(list(row)) for row in probability.to_numpy(dtype=np.float64))
            found["effective"] = (effective, probability.shape[1], float(active.iloc[0].sum()))
        shares = 100 * active.fillna(0).mean(axis=0)
        found["drawn"] = (float(shares.max()), float(shares.min()))
    if len(observed):
        truth = layer_matrix(observed, "gradient_rms")
        first, last = truth.iloc[0].tolist(), truth.iloc[-1].tolist()
        found["spread"] = (max(first) / min(first),) if min(first) > 0 else None
        drift = rank_correlation(first, last) if len(truth) > 1 else None
        found["drift"] = None if drift is None else (drift,)
        if len(believed) and believed["importance"].notna().any():
            rho = agreement(believed, observed)["rho"].dropna()
            found["agreement"] = (float(rho.mean()),) if len(rho) else None
    return found
