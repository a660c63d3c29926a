"""What training made a model lose or gain on suites of no task: scores before and after, paired by item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pandas import DataFrame

from harness.reporting.frames import Frames
from harness.reporting.layout import groups, method_name, of_method, other_outcomes, protocol_of, trained
from harness.reporting.score_tables import suite_facts
from harness.reporting.stats import document_interval, pair_documents, summarise
from harness.reporting.table import UNKNOWN, Footnotes, Table, number, signed
from harness.study.spec import Study


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number that a suite gives a run."""

    name: str
    runs: DataFrame
    """Columns run and value."""
    documents: DataFrame
    """Columns run, suite, document and value."""
    scale: float
    digits: int


def forgetting_table(frames: Frames, study: Study) -> Table:
    """One row a model, task, suite, score and method: before, after, their difference with its interval over items."""
    notes = Footnotes()
    raw: list[dict[str, Any]] = []
    display: list[dict[str, str]] = []
    before = study.untrained()
    assert before is not None
    for model, task in groups(study):
        base = list(of_method(frames.ok_runs(), model, task, before)["run"])[:1]
        for suite in study.forgetting:
            for score in _scores(frames, study, suite):
                for method in trained(study):
                    runs = of_method(frames.ok_runs(), model, task, method)
                    numbers = _numbers(score, base, dict(zip(runs["seed"], runs["run"], strict=True)), suite)
                    keys = {"model": model, "trained on": task, "suite": suite, "score": score.name}
                    raw.append({**{k.replace(" ", "_"): v for k, v in keys.items()}, "method": method, **numbers})
                    other = other_outcomes(of_method(frames.runs, model, task, method), notes)
                    shown = keys | {"method": method_name(study, frames, method, notes)}
                    display.append(shown | _text(numbers, score, other, notes))
    alike = [key for key in ("model", "trained on") if len({row[key] for row in display}) == 1]
    _notes(study, frames, before, notes)
    return Table(
        name="forgetting",
        caption="Forgetting: suites that no task trains for, before training (the untrained model) and after; mean ± "
        "sample standard deviation over seeds (number of ok runs). Difference: after minus before, paired by item, "
        "with its 95 % interval over items. Files in % and points; tasks of lm-eval as lm-eval gives them.",
        raw=DataFrame(raw),
        display=DataFrame([{k: v for k, v in row.items() if k not in alike} for row in display]),
        footnotes=notes.lines(),
    )


def _scores(frames: Frames, study: Study, suite: str) -> list[Score]:
    kind = protocol_of(study.forgetting[suite])
    if kind == "lm-eval":
        return _of_lm_eval(frames, suite)
    names = {"accuracy": ("correct", "accuracy" if kind == "likelihood" else "accuracy, written")}
    if kind == "likelihood":
        names["accuracy_normalised"] = ("correct_normalised", "accuracy per character")
    runs, documents = (table[table["suite"] == suite] for table in (frames.scores, frames.documents))
    return [
        Score(
            name=name,
            runs=runs[["run"]].assign(value=runs[column]),
            documents=documents[["run", "suite", "document"]].assign(value=documents[of_document]),
            scale=100,
            digits=1,
        )
        for column, (of_document, name) in names.items()
    ]


def _of_lm_eval(frames: Frames, suite: str) -> list[Score]:
    found = []
    metrics = frames.lm_eval[frames.lm_eval["suite"] == suite]
    for (task, metric, filtered), runs in metrics.groupby(["lm_task", "metric", "filter"], sort=False):
        documents = frames.lm_eval_documents
        same = (documents["suite"] == suite) & (documents["lm_task"] == task)
        same &= (documents["metric"] == metric) & (documents["filter"] == filtered)
        found.append(
            Score(
                name=f"{task} {metric}" + ("" if filtered == "none" else f" ({filtered})"),
                runs=runs[["run", "value"]],
                documents=documents.loc[same, ["run", "suite", "document", "value"]],
                scale=1,
                digits=4,
            )
        )
    return found


def _numbers(score: Score, base: list[str], runs: dict[int, str], suite: str) -> dict[str, Any]:
    """Means over the runs, and the paired difference to the one untrained run."""
    values = {str(run): float(value) for run, value in zip(score.runs["run"], score.runs["value"], strict=True)
              if value == value}  # fmt: skip
    scored = {seed: run for seed, run in runs.items() if run in values}
    after = summarise([values[run] for run in scored.values()])
    pairs = pair_documents(
        score.documents,
        first=scored,
        second=dict.fromkeys(scored, base[0]) if base else {},
        suite=suite,
        value="value",
    )
    known = pairs.first.size > 0
    low, high = document_interval(pairs) or (None, None)
    return {
        "before": next((values[run] for run in base if run in values), None),
        "after_mean": after.mean,
        "after_sd": after.sd,
        "ok_runs": after.n,
        "difference": float((pairs.first - pairs.second).mean()) if known else None,
        "difference_low": low,
        "difference_high": high,
        "items": pairs.first.shape[1] if known else None,
        "changed_items": int((pairs.first != pairs.second).any(axis=0).sum()) if known else None,
    }


def _text(numbers: dict[str, Any], score: Score, other: str, notes: Footnotes) -> dict[str, str]:
    def scaled(key: str) -> float | None:
        return None if numbers[key] is None else numbers[key] * score.scale

    n = int(numbers["ok_runs"])
    if n:
        spread = number(scaled("after_sd"), score.digits)
        if n == 1:
            spread += notes.mark("a single run has no standard deviation.")
        after = f"{number(scaled('after_mean'), score.digits)} ± {spread} ({n})" + (f"; {other}" if other else "")
    else:
        after = f"{UNKNOWN} ({other or 'not scored'})"
    low, high = scaled("difference_low"), scaled("difference_high")
    interval = UNKNOWN if low is None else " to ".join(signed(end, score.digits) for end in (low, high))
    if numbers["changed_items"] == 0:
        interval = "no item changed"
    return {
        "before": number(scaled("before"), score.digits),
        "after": after,
        "difference": signed(scaled("difference"), score.digits),
        "95 % interval over items": interval,
        "items (changed)": UNKNOWN if numbers["items"] is None else f"{numbers['items']} ({numbers['changed_items']})",
    }


def _notes(study: Study, frames: Frames, before: str, notes: Footnotes) -> None:
    notes.add(
        f"Before: {before}, one run. The interval resamples items with the seeds as they are: it says whether these "
        "runs changed, not what another seed would do; for that see the spread beside the mean. Changed: items with "
        "another outcome than before in any run."
    )
    scores = frames.ok_scores()
    for suite in study.forgetting:
        mine = scores[scores["suite"] == suite]
        if len(mine):
            chance = mine["chance"].dropna()
            level = f"; chance level {number(100 * float(chance.iloc[0]), 1)} %" if len(chance) else ""
            notes.add(f"{suite_facts(suite, mine)}{level}.")
        of_lm_eval = frames.lm_eval[frames.lm_eval["suite"] == suite]
        for task, rows in of_lm_eval.groupby("lm_task", sort=False):
            notes.add(f"{suite}: lm-eval task {task}, version {rows['version'].iloc[0]}.")
