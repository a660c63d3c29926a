"""The llm-adapters protocol as functions of the lm-eval task files: text kept, answer extraction, scoring.

The rules are those of the scorers published with LLM-Adapters, described in our words; what is odd in them ("untrue"
counts as true, AQuA takes the first capital A to E of any word) is kept, since the published numbers rest on it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from harness.inputs.choices import question
from harness.inputs.prompts import RESPONSE_MARK, Row
from harness.study.sources import LmEvalSuite, ReadSuite, Scoring, SuiteSource

TOLERANCE = 0.001

_NUMBER = re.compile(r"-?\d+\.?\d*")
_FIRST: dict[Scoring, re.Pattern[str]] = {
    "letter": re.compile("[A-E]"),
    "true_false": re.compile("true|false"),
    "solution": re.compile("solution[12]"),
    "answer": re.compile("answer[1-5]"),
    "ending": re.compile("ending[1-4]"),
    "option": re.compile("option[12]"),
}
"""Case-sensitive, anywhere in the text, no word boundaries: the first match is the prediction."""


def kept_text(continuation: str) -> str:
    """What is scored of a model's continuation: up to the next response mark, stripped.

    The published scripts decode prompt and continuation together and keep what lies between the first and the second
    mark; the first one ends the prompt.
    """
    return continuation.split(RESPONSE_MARK, 1)[0].strip()


def extract(rule: Scoring, text: str) -> str | None:
    """The prediction in `text` under `rule`, or None where nothing matches (the row then counts as wrong).

    `number` deletes all commas and takes the last match of: optional minus, digits, optional point, optional digits.
    All other rules take the first of their fixed strings.
    """
    if rule == "number":
        numbers = _NUMBER.findall(text.replace(",", ""))
        return numbers[-1] if numbers else None
    match = _FIRST[rule].search(text)
    return match.group() if match else None


def is_correct(rule: Scoring, prediction: str | None, gold: str) -> bool:
    """Whether a prediction is right; numbers may differ from the gold by `TOLERANCE`."""
    if prediction is None:
        return False
    if rule == "number":
        return abs(float(prediction) - float(gold)) <= TOLERANCE
    return prediction == gold


def check_gold(rule: Scoring, gold: str) -> None:
    """Refuse a gold answer that no prediction could ever equal.

    Raises:
        ValueError: `gold` is not a finite number, or not one of the rule's strings; the message has the near one.
    """
    if rule == "number":
        if not _is_number(gold):
            near = gold.replace(",", "").strip(" $%")
            mend = f": write {near!r}" if _is_number(near) else ""
            raise ValueError(f"answer {gold!r} is not a number, as scoring 'number' needs{mend}")
    elif not _FIRST[rule].fullmatch(gold):
        near = gold.strip().upper() if rule == "letter" else gold.strip().lower()
        mend = f": write {near!r}" if _FIRST[rule].fullmatch(near) else ""
        raise ValueError(f"answer {gold!r} is not one that scoring {rule!r} knows ({_FIRST[rule].pattern}){mend}")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def check_row(source: SuiteSource, row: Row) -> None:
    """Refuse a test row that no answer could score as right.

    Raises:
        ValueError: its answer is none that the suite's scoring knows, or it has no options to choose among.
    """
    assert not isinstance(source, LmEvalSuite)
    if isinstance(source, ReadSuite) and source.choices is not None:
        question(row, source.choices)
    elif source.scoring != "likelihood":
        check_gold(source.scoring, row["answer"])


def score(rule: Scoring, doc: Mapping[str, str], results: Sequence[str]) -> dict[str, Any]:
    """lm-eval's `process_results`: metrics `acc` and `parsed` (1.0 or 0.0) of one test row and its one continuation."""
    prediction = extract(rule, kept_text(results[0]))
    return {
        "acc": float(is_correct(rule, prediction, doc["answer"])),
        "parsed": float(prediction is not None),
    }


# One name a rule, since a task file can only point at a function.
score_number = partial(score, "number")
score_letter = partial(score, "letter")
score_true_false = partial(score, "true_false")
score_solution = partial(score, "solution")
score_answer = partial(score, "answer")
score_ending = partial(score, "ending")
score_option = partial(score, "option")
