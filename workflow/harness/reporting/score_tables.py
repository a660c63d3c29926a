"""Accuracy, held-out loss, and the paired differences between the subject and its rivals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd
from pandas import DataFrame

from harness.records.columns import NOT_SCORED
from harness.reporting.frames import Frames
from harness.reporting.layout import (
    SUBJECT,
    VALIDATION,
    cells,
    groups,
    loss_cells,
    losses_on_validation,
    method_name,
    of_method,
    other_outcomes,
    trained,
)
from harness.reporting.stats import (
    Difference,
    detectable,
    judge,
    pair_documents,
    paired_difference,
    seed_difference,
    summarise,
)
from harness.reporting.table import UNKNOWN, Footnotes, Table, number, signed
from harness.study.spec import Study


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A score of a run on a suite, and how it is displayed."""

    name: str
    """Of its table."""
    column: Literal["accuracy", "accuracy_normalised", "heldout_loss"]
    document_column: Literal["correct", "correct_normalised", "loss"]
    cells: Callable[[Study], list[tuple[str, str]]]
    """The tasks and suites that have it."""
    title: str
    unit: str
    """Unit of the displayed numbers."""
    raw_unit: str
    """Suffix of the csv columns."""
    scale: float
    digits: int
    written: bool = False
    """Rests on what the model writes, which may hold no answer."""

    @property
    def is_share(self) -> bool:
        """A share of right answers, which has a chance level."""
        return self.raw_unit == "share"


_SHARE: dict[str, Any] = {"unit": "%", "raw_unit": "share", "scale": 100, "digits": 1}
ACCURACY = Measure(
    name="accuracy",
    column="accuracy",
    document_column="correct",
    cells=lambda study: cells(study, "written"),
    title="Accuracy",
    written=True,
    **_SHARE,
)
LIKELIHOOD = Measure(
    name="likelihood",
    column="accuracy",
    document_column="correct",
    cells=lambda study: cells(study, "likelihood"),
    title="Accuracy by likelihood (the likeliest of the allowed answers; nothing is written)",
    **_SHARE,
)
NORMALISED = Measure(
    name="likelihood_normalised",
    column="accuracy_normalised",
    document_column="correct_normalised",
    cells=lambda study: cells(study, "likelihood"),
    title="Accuracy by likelihood per character of the answer (lm-eval's acc_norm)",
    **_SHARE,
)
HELDOUT_LOSS = Measure(
    name="heldout_loss",
    column="heldout_loss",
    document_column="loss",
    cells=loss_cells,
    title="Held-out loss",
    unit="nats per answer token",
    raw_unit="nats_per_token",
    scale=1,
    digits=4,
)

MEASURES = (ACCURACY, LIKELIHOOD, NORMALISED, HELDOUT_LOSS)
"""In the order of the page; a study has those with cells."""


def scores_of(frames: Frames, study: Study, measure: Measure) -> DataFrame:
    """Scores of the runs that count, with model, task, method and seed beside them."""
    scores = frames.ok_scores()
    if measure is HELDOUT_LOSS:
        validation = losses_on_validation(frames, study)
        scores = pd.concat([scores, validation], ignore_index=True) if len(validation) else scores
    return scores


def score_table(frames: Frames, study: Study, measure: Measure) -> Table:
    """Rows = models and methods, columns = tasks and suites; mean ± sample sd over the ok seeds."""
    notes = Footnotes()
    scores = scores_of(frames, study, measure)
    raw: list[dict[str, Any]] = []
    display: list[dict[str, str]] = []
    for model in study.models:
        for method in study.methods:
            shown = {"model": model, "method": method_name(study, frames, method, notes)}
            for task, suite in measure.cells(study):
                runs = of_method(frames.runs, model, task, method)
                mine = of_method(scores[scores["suite"] == suite], model, task, method)
                numbers = cell_numbers(mine, runs, measure)
                raw.append({"model": model, "method": method, "task": task, "suite": suite, **numbers})
                shown[f"{task} / {suite}"] = cell_text(numbers, runs, measure, notes)
            display.append(shown)
        if measure.is_share:
            display.append(_chance_row(scores, study, model, measure))
    _suite_notes(frames, study, measure, notes)
    parts = f"mean ± sample standard deviation over seeds (number of ok runs), {measure.unit}"
    if measure.written:
        parts += "; in brackets the share of answers from which nothing could be read, % (they count as wrong)"
    caption = f"{measure.title}: {parts}. Only runs with status ok count."
    return Table(
        name=measure.name, caption=caption, raw=DataFrame(raw), display=DataFrame(display), footnotes=notes.lines()
    )


def cell_numbers(scores: DataFrame, runs: DataFrame, measure: Measure) -> dict[str, Any]:
    """Mean and spread of one method on one suite."""
    summary = summarise([float(v) for v in scores[measure.column].dropna()])
    numbers: dict[str, Any] = {
        "ok_runs": summary.n,
        "other_runs": int((runs["status"] != "ok").sum()),
        f"{measure.column}_mean_{measure.raw_unit}": summary.mean,
        f"{measure.column}_sd_{measure.raw_unit}": summary.sd,
    }
    if measure.is_share:
        known = scores["chance"].dropna()
        numbers["chance_share"] = float(known.iloc[0]) if len(known) else None
    if measure.written:
        numbers["unparsed_mean_share"] = summarise([float(v) for v in scores["unparsed_share"].dropna()]).mean
    return numbers


def cell_text(numbers: dict[str, Any], runs: DataFrame, measure: Measure, notes: Footnotes) -> str:
    """The same for display, with the outcomes of the runs that do not count."""
    outcomes = other_outcomes(runs, notes)
    n = int(numbers["ok_runs"])
    if n == 0:
        if outcomes:
            return f"{UNKNOWN} ({outcomes})"
        text = "ran, but was not scored." if len(runs) else "no such run in this study."
        return f"{UNKNOWN}{notes.mark(text)}"
    mean, sd = (numbers[f"{measure.column}_{part}_{measure.raw_unit}"] for part in ("mean", "sd"))
    scaled_sd = None if sd is None else sd * measure.scale
    spread = number(scaled_sd, measure.digits)
    if sd is None:
        spread += notes.mark("a single run has no standard deviation.")
    text = f"{number(mean * measure.scale, measure.digits)} ± {spread} ({n})"
    if measure.written:
        unparsed = numbers["unparsed_mean_share"]
        text += f" [{number(None if unparsed is None else 100 * unparsed, 1)}]"
    unscored = int((runs["status"] == "ok").sum()) - n
    if unscored:
        reasons = {note for text in runs["notes"].dropna() for note in text.split("; ") if note.startswith(NOT_SCORED)}
        mark = "".join(notes.mark(f"{reason}.") for reason in sorted(reasons))
        outcomes = ", ".join(filter(None, [outcomes, f"{unscored} not scored{mark}"]))
    return f"{text}; {outcomes}" if outcomes else text


def _chance_row(scores: DataFrame, study: Study, model: str, measure: Measure) -> dict[str, str]:
    row = {"model": model, "method": "chance level"}
    for task, suite in measure.cells(study):
        mine = scores[(scores["task"] == task) & (scores["suite"] == suite)]
        known = mine["chance"].dropna()
        row[f"{task} / {suite}"] = number(100 * float(known.iloc[0]), 1) if len(known) else "none"
    return row


def suite_facts(name: str, scores: DataFrame) -> str:
    """Items, protocol and counts of a suite, from its scores of several runs."""
    what = f"{name}: {int(scores['rows'].max())} test items"
    protocols = sorted(set(scores["protocol"].dropna()))
    if protocols:
        what += f", protocol {' and '.join(protocols)}"
    if bool(scores["limited"].fillna(False).any()):
        what += ", not the whole test file"
    for column, text in (
        ("leaked_rows", "occur word for word in the training rows"),
        ("truncated_rows", "were cut at the length limit"),
    ):
        most = scores[column].max()
        if most == most and most is not None and int(most) > 0:
            what += f"; {int(most)} {text}"
    return what


def _suite_notes(frames: Frames, study: Study, measure: Measure, notes: Footnotes) -> None:
    scores = frames.ok_scores()
    alone = [task for task, suite in measure.cells(study) if suite == VALIDATION]
    if alone:
        columns = ", ".join(f"{task} / {VALIDATION}" for task in alone)
        seen = ", which the search of the learning rates saw too" if study.search else ""
        notes.add(f"{columns}: no suite; this is the loss on the task's validation rows{seen}.")
    for task, suite in measure.cells(study):
        mine = scores[(scores["task"] == task) & (scores["suite"] == suite)]
        if mine.empty:
            continue
        what = suite_facts(f"{task} / {suite}", mine)
        if measure is HELDOUT_LOSS:
            what += f"; {int(mine['heldout_tokens'].max())} answer tokens"
        notes.add(what + ".")
    stale = int(frames.ok_runs()["stale"].fillna(False).sum())
    if stale:
        notes.add(f"{stale} of the runs that count were made by code that has changed since (see the table of runs).")


# ---------------------------------------------------------------- paired differences


VERDICT_RULE = (
    "Verdict: a claim needs at least 3 seeds, both intervals clear of 0, and p < 0.05 after Holm's correction over "
    "the rivals of the same suite that have a p value. p is the larger of the bootstrap's and the t test's. "
    "Seeds and documents are resampled together; with a few seeds the bootstrap interval alone is too narrow, "
    "the t interval (one degree of freedom less than seeds) carries the noise between seeds."
)
DETECTABLE = (
    "Detectable: the least true difference that as many seeds and documents would show in 80 % of cases, if they "
    "scatter as these did. Where there is no claim, a smaller one may be there all the same."
)
SEEDS_ALONE = (
    "On validation rows, whose losses are not kept one by one, the t interval alone decides: "
    "it takes those rows as given."
)


def difference_table(frames: Frames, study: Study, measure: Measure) -> Table:
    """The subject minus each rival, suite by suite, with both intervals and the verdict."""
    notes = Footnotes()
    raw: list[dict[str, Any]] = []
    display: list[dict[str, str]] = []
    rivals = [method for method in trained(study) if method != SUBJECT]
    if SUBJECT not in study.methods:
        notes.add(f"The study has no method labelled {SUBJECT!r}, so there is nothing to compare.")
        rivals = []
    for model, task in groups(study):
        for suite in (suite for one, suite in measure.cells(study) if one == task):
            differences = [difference(frames, (model, task), (SUBJECT, rival), suite, measure) for rival in rivals]
            for rival, result in zip(rivals, judge(differences), strict=True):
                keys = {"model": model, "task": task, "suite": suite, "rival": rival}
                raw.append(keys | _difference_numbers(result, measure))
                shown = {"rival": method_name(study, frames, rival, notes)}
                display.append(keys | shown | _difference_text(result, measure, notes))
    notes.add(VERDICT_RULE)
    notes.add(DETECTABLE)
    if any(suite == VALIDATION for _, suite in measure.cells(study)):
        notes.add(SEEDS_ALONE)
    unit = "percentage points" if measure.is_share else measure.unit
    return Table(
        name=f"difference_{measure.name}",
        caption=f"{measure.title}, {SUBJECT} minus each rival, paired by seed and document, {unit}; 95 % intervals.",
        raw=DataFrame(raw),
        display=DataFrame(display),
        footnotes=notes.lines(),
    )


def difference(frames: Frames, at: tuple[str, str], pair: tuple[str, str], suite: str, measure: Measure) -> Difference:
    """The first method of `pair` minus the second, on one suite of the model and task `at`."""
    runs_of = [of_method(frames.ok_runs(), *at, method) for method in pair]
    if suite == VALIDATION:
        losses = [runs.dropna(subset="validation_loss").set_index("seed")["validation_loss"] for runs in runs_of]
        return seed_difference(*(dict(zip(map(int, one.index), map(float, one), strict=True)) for one in losses))
    by_seed = [dict(zip(map(int, runs["seed"]), map(str, runs["run"]), strict=True)) for runs in runs_of]
    scored = set(frames.scores.loc[frames.scores["suite"] == suite, "run"])
    first, second = ({seed: run for seed, run in runs.items() if run in scored} for runs in by_seed)
    pairs = pair_documents(frames.documents, first=first, second=second, suite=suite, value=measure.document_column)
    return paired_difference(pairs)


def _difference_numbers(result: Difference, measure: Measure) -> dict[str, Any]:
    unit = measure.raw_unit
    boot, seed_t = result.bootstrap or (None, None), result.seed_t or (None, None)
    return {
        f"difference_{unit}": result.mean,
        f"bootstrap_low_{unit}": boot[0],
        f"bootstrap_high_{unit}": boot[1],
        f"seed_t_low_{unit}": seed_t[0],
        f"seed_t_high_{unit}": seed_t[1],
        "p": result.p,
        "p_holm": result.p_holm,
        f"detectable_{unit}": detectable(result),
        "seeds": result.seeds,
        "documents": result.documents,
        "verdict": result.verdict,
    }


def _difference_text(result: Difference, measure: Measure, notes: Footnotes) -> dict[str, str]:
    def interval(ends: tuple[float, float] | None) -> str:
        if ends is None and result.seeds_alone and result.seeds > 1:
            return UNKNOWN + notes.mark("losses of single validation rows are not kept.")
        if ends is None:
            return UNKNOWN + notes.mark("not defined: fewer than 2 seeds in common, or no spread between them.")
        return " to ".join(signed(end * measure.scale, measure.digits) for end in ends)

    mean, least = None if result.mean is None else result.mean * measure.scale, detectable(result)
    return {
        "difference": signed(mean, measure.digits),
        "bootstrap interval": interval(result.bootstrap),
        "seed-level t interval": interval(result.seed_t),
        "p (Holm)": number(result.p_holm, 3),
        "detectable": number(None if least is None else least * measure.scale, measure.digits),
        "seeds × documents": f"{result.seeds} × {UNKNOWN if result.seeds_alone else result.documents}",
        "verdict": result.verdict,
    }
