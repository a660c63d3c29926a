"""Tasks of lm-eval: its own metrics with its standard errors, in a table of their own."""

from __future__ import annotations

from typing import Any

from pandas import DataFrame

from harness.reporting.frames import Frames
from harness.reporting.layout import cells, method_name, of_method, other_outcomes
from harness.reporting.stats import summarise
from harness.reporting.table import UNKNOWN, Footnotes, Table, number
from harness.study.sources import LmEvalSuite
from harness.study.spec import Study

DIGITS = 4


def lm_eval_table(frames: Frames, study: Study) -> Table:
    """Rows = models and methods, columns = task, suite and metric; as lm-eval gives them, averaged over ok seeds."""
    notes = Footnotes()
    keys = frames.ok_runs()[["run", "model", "task", "method", "seed"]]
    scores = frames.lm_eval.merge(keys, on="run", how="inner", validate="many_to_one")
    columns = [(*cell, *metric) for cell in cells(study, "lm-eval") for metric in _metrics(scores, study, *cell)]
    raw: list[dict[str, Any]] = []
    display: list[dict[str, str]] = []
    for model in study.models:
        for method in study.methods:
            shown = {"model": model, "method": method_name(study, frames, method, notes)}
            for task, suite, lm_task, metric, filtered in columns:
                of_suite = scores[(scores["suite"] == suite) & (scores["lm_task"] == lm_task)]
                mine = of_method(
                    of_suite[(of_suite["metric"] == metric) & (of_suite["filter"] == filtered)], model, task, method
                )
                numbers = _numbers(mine)
                raw.append(
                    {"model": model, "method": method, "task": task, "suite": suite, "lm_task": lm_task}
                    | {"metric": metric, "filter": filtered}
                    | numbers
                )
                runs = of_method(frames.runs, model, task, method)
                shown[_title(study, task, suite, lm_task, metric, filtered)] = _text(numbers, runs, notes)
            display.append(shown)
    _notes(scores, study, notes)
    return Table(
        name="lm_eval",
        caption="Tasks of lm-eval, with its own prompts and metrics, in its own units: mean ± sample standard "
        "deviation over seeds (number of ok runs); in brackets lm-eval's standard error over items, mean over runs.",
        raw=DataFrame(raw),
        display=DataFrame(display),
        footnotes=notes.lines(),
    )


def _metrics(scores: DataFrame, study: Study, task: str, suite: str) -> list[tuple[str, str, str]]:
    """(task of lm-eval, metric, filter) of a suite; of a group that has an average of its own, this alone."""
    mine = scores[(scores["task"] == task) & (scores["suite"] == suite)]
    own = mine[mine["lm_task"] == _source(study, task, suite).task]
    chosen = (own if len(own) else mine)[["lm_task", "metric", "filter"]].drop_duplicates()
    return [(str(a), str(b), str(c)) for a, b, c in chosen.itertuples(index=False, name=None)]


def _source(study: Study, task: str, suite: str) -> LmEvalSuite:
    source = study.tasks[task].suites[suite]
    assert isinstance(source, LmEvalSuite)
    return source


def _title(study: Study, task: str, suite: str, lm_task: str, metric: str, filtered: str) -> str:
    part = "" if lm_task == _source(study, task, suite).task else f" {lm_task}"
    return f"{task} / {suite}:{part} {metric}" + ("" if filtered == "none" else f" ({filtered})")


def _numbers(mine: DataFrame) -> dict[str, Any]:
    summary = summarise([float(v) for v in mine["value"].dropna()])
    errors = summarise([float(v) for v in mine["stderr"].dropna()])
    first = mine.iloc[0] if len(mine) else None
    return {
        "ok_runs": summary.n,
        "value_mean": summary.mean,
        "value_sd": summary.sd,
        "stderr_mean": errors.mean,
        "higher_is_better": None if first is None else first["higher_is_better"],
        "version": None if first is None else first["version"],
        "num_fewshot": None if first is None else first["num_fewshot"],
        "items": None if first is None else first["items"],
    }


def _text(numbers: dict[str, Any], runs: DataFrame, notes: Footnotes) -> str:
    outcomes = other_outcomes(runs, notes)
    if not numbers["ok_runs"]:
        return f"{UNKNOWN} ({outcomes})" if outcomes else UNKNOWN + notes.mark("no such run, or it was not scored.")
    spread = number(numbers["value_sd"], DIGITS)
    if numbers["value_sd"] is None:
        spread += notes.mark("a single run has no standard deviation.")
    text = f"{number(numbers['value_mean'], DIGITS)} ± {spread} ({numbers['ok_runs']})"
    text += f" [{number(numbers['stderr_mean'], DIGITS)}]"
    return f"{text}; {outcomes}" if outcomes else text


def _notes(scores: DataFrame, study: Study, notes: Footnotes) -> None:
    for task, suite in cells(study, "lm-eval"):
        mine = scores[(scores["task"] == task) & (scores["suite"] == suite)]
        for lm_task, rows in mine.groupby("lm_task", sort=False):
            first = rows.iloc[0]
            what = f"{task} / {suite}: lm-eval task {lm_task}, version {first['version']}, "
            what += f"{first['num_fewshot']}-shot, {first['items']} items"
            what += ", not the whole task" if first["limited"] else ""
            what += ", in the tokenizer's chat format" if first["chat_template"] else ""
            lower = sorted(set(rows.loc[~rows["higher_is_better"].fillna(True), "metric"]))
            notes.add(what + (f"; lower is better: {', '.join(lower)}" if lower else "") + ".")
