"""Tasks of lm-eval by name: its own prompts, metrics, versions and standard errors, nothing of our protocol."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.evaluating.stock_data import load
from harness.inputs.prompts import Prompt, Row
from harness.inputs.tokens import check_ids
from harness.records.run import LmEvalScore
from harness.study.jobs import SuiteJob
from harness.study.sources import LmEvalSuite

BOOTSTRAP_ITERATIONS = 1000
"""For standard errors that have no formula; lm-eval's default, 100,000, takes longer than scoring does."""
DEFAULT_NEW_TOKENS = 256
"""lm-eval's own limit of an answer where a task names none."""
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


@dataclass(frozen=True, kw_only=True)
class StockOutcome:
    """What lm-eval found on one suite."""

    scores: list[LmEvalScore]
    documents: list[dict[str, Any]]
    """Rows of `columns.LM_EVAL_SAMPLE_COLUMNS`, without the run."""
    settings: dict[str, Any]
    """How it was scored, for the record."""


def score_stock(lm: Any, suite: SuiteJob, folder: Path) -> StockOutcome:
    """Let lm-eval score one of its own tasks.

    Args:
        lm: made by `evaluating.lm.wrap`.
        suite: of kind lm-eval.
        folder: where `stock_data.fetch` left the data.

    Raises:
        UserError: the suite asks in the chat format, and the model's tokenizer has no chat template, or one with tokens
            that the model's embedding lacks.
    """
    from lm_eval import evaluate

    source = suite.source
    assert isinstance(source, LmEvalSuite)
    if source.apply_chat_template and not lm.tokenizer.chat_template:
        raise UserError(f"{suite.label}: apply_chat_template: the model's tokenizer has no chat template; write false")
    if source.apply_chat_template:
        asked = Prompt("chat", lm.tokenizer).evaluation_tokens(Row(instruction="?", input="", output="", answer=""))
        check_ids([asked], tokenizer=lm.tokenizer, embedding=lm.model.get_input_embeddings())
    loaded = load(source, folder)
    lm.ask_as_lm_eval(stops=Prompt("chat", lm.tokenizer).stops if source.apply_chat_template else ())
    lowered = _bound_answers(lm, loaded)
    os.environ["DISABLE_MULTIPROC"] = "1"  # a bootstrap in a process for each core would take those of other jobs
    results = evaluate(
        lm=lm,
        task_dict=loaded,
        limit=source.limit,
        bootstrap_iters=BOOTSTRAP_ITERATIONS,
        apply_chat_template=source.apply_chat_template,
        fewshot_as_multiturn=source.apply_chat_template,
    )
    first = next(iter(results["samples"].values()))[0]
    return StockOutcome(
        scores=[score for name in results["results"] for score in _scores(suite.label, source, name, results)],
        documents=[row for name, found in results["samples"].items() for row in _rows(suite.label, name, found)],
        settings={
            "protocol": "lm-eval",
            "task": source.task,
            "first_question": str(first["arguments"][0][0]),
            "bootstrap_iterations": BOOTSTRAP_ITERATIONS,
            "max_gen_toks_lowered": lowered,
        },
    )


def _bound_answers(lm: Any, loaded: dict[str, Any]) -> dict[str, list[int]]:
    """Leave half of the model's context to the question where lm-eval would refuse; old and new limits by task."""
    room, lowered = lm.max_length // 2, {}
    for name, task in loaded["tasks"].items():
        if task.get_config("output_type") != "generate_until":
            continue
        settings = task.get_config("generation_kwargs")
        given = next((settings[key] for key in _LIMITS if settings.get(key) is not None), DEFAULT_NEW_TOKENS)
        if given > room:
            lowered[name] = [int(given), room]
            task.set_config("generation_kwargs", {"max_gen_toks": room}, update=True)
    return lowered


def _scores(label: str, source: LmEvalSuite, name: str, results: dict[str, Any]) -> list[LmEvalScore]:
    """Every metric of one task or group; groups without an average of their own have none."""
    found = results["results"][name]
    counted = results["n-samples"].get(name)
    leaves = [counted] if counted else [results["n-samples"][leaf] for leaf in _leaves(name, results)]
    scores = []
    for key, value in found.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        error = _number(found.get(f"{metric}_stderr,{filtered}"))
        number = _number(value)
        scores.append(
            LmEvalScore(
                suite=label,
                task=name,
                metric=metric,
                filter=filtered,
                value=number,
                value_why=None if number is not None else f"lm-eval gives {str(value)[:40]!r}, which is no number",
                stderr=error,
                stderr_why=None if error is not None else "lm-eval gives none for this metric or number of items",
                higher_is_better=results["higher_is_better"].get(name, {}).get(metric),
                version=str(results["versions"].get(name)),
                num_fewshot=results["n-shot"].get(name),
                chat_template=source.apply_chat_template,
                items=sum(leaf["effective"] for leaf in leaves),
                limited=any(leaf["effective"] < leaf["original"] for leaf in leaves),
            )
        )
    return scores


def _leaves(name: str, results: dict[str, Any]) -> list[str]:
    children = results["group_subtasks"].get(name)
    return [name] if children is None else [leaf for child in children for leaf in _leaves(child, results)]


def _rows(label: str, name: str, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "suite": label, "lm_task": name, "metric": metric, "filter": sample["filter"],
            "document": int(sample["doc_id"]), "value": _number(sample[metric]), "target": str(sample["target"]),
            "answers": json.dumps(sample["filtered_resps"], default=str, ensure_ascii=False),
            "prompt_sha256": sample["prompt_hash"],
        }
        for sample in samples
        for metric in sample["metrics"]
    ]  # fmt: skip


def _number(value: Any) -> float | None:
    """A finite number; None for everything else that lm-eval calls a result."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
