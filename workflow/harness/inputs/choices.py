r"""The allowed answers of a multiple-choice row in LLM-Adapters format, for scoring by likelihood.

An instruction holds the question, the options ("Answer1: ... Answer2: ...", or Solution, Ending, Option), and at its
end their labels ("Answer format: answer1/answer2"). `labels` are answers as they were trained, "the correct answer is
answer1". `texts` are the options' own texts, and the question is asked as stock lm-eval asks it: ARC and PIQA as
"Question: ...\nAnswer:", HellaSwag as the text that the ending continues.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from harness.inputs.prompts import Row
from harness.study.sources import Choices

TRAINED = "the correct answer is "
"""What the published training rows write before the label."""

_FORMAT = re.compile(r"Answer format:\s*(\w+(?:/\w+)+)\s*$")
_LIST = re.compile(r"(?:^|\s)(Answer|Solution|Ending|Option)1:")
_ASKED = re.compile(r"^Please (?:choose|answer)\b[^:]*:\s*")
_CONTINUED = "Ending"


@dataclass(frozen=True)
class Question:
    """One multiple-choice row."""

    text: str | None
    """What stands before the answer, in stock lm-eval's words; None: the task's own prompt."""
    answers: tuple[str, ...]
    """The allowed answers, as they are scored."""
    labels: tuple[str, ...]
    """The same as the row's `answer` names them."""
    gold: int
    """Which of them is right."""


def question(row: Row, choices: Choices) -> Question:
    """The allowed answers of a row.

    Raises:
        ValueError: the row has no options, or its answer is none of them; the message says what was looked for.
    """
    text: str | None = None
    if choices == "labels":
        found = _FORMAT.search(row["instruction"])
        if found is None:
            raise ValueError('the instruction does not end with its labels ("Answer format: answer1/answer2")')
        labels = tuple(found.group(1).split("/"))
        answers = tuple(f"{TRAINED}{label}" for label in labels)
    else:
        text, labels, answers = _options(row["instruction"])
    if row["answer"] not in labels:
        raise ValueError(f"answer {row['answer']!r} is none of {', '.join(labels)}")
    return Question(text=text, answers=answers, labels=labels, gold=labels.index(row["answer"]))


def _options(instruction: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """Question, labels and texts of the options."""
    stated = _FORMAT.search(instruction)
    body = instruction if stated is None else instruction[: stated.start()]
    first = _LIST.search(body)
    if first is None:
        raise ValueError('the instruction lists no options ("Answer1: ... Answer2: ...", or Solution, Ending, Option)')
    word = first.group(1)
    texts = tuple(text.strip() for text in _parts(body[first.start() :], word))
    if len(texts) < 2 or not all(texts):
        raise ValueError(f"of its options ({word}1: ... {word}2: ...) one is empty or there is only one")
    stem = _ASKED.sub("", body[: first.start()]).strip()
    labels = tuple(f"{word.lower()}{number}" for number in range(1, len(texts) + 1))
    if stated is not None and tuple(stated.group(1).split("/")) != labels:
        raise ValueError(f"it lists {', '.join(labels)}, but its last line names {stated.group(1)}")
    return (stem if word == _CONTINUED else f"Question: {stem}\nAnswer:"), labels, texts


def _parts(text: str, word: str) -> Iterator[str]:
    """What follows "Answer1:", "Answer2:", ... each up to the next number's mark."""
    number = 1
    rest = text.partition(f"{word}1:")[2]
    while True:
        number += 1
        found = re.search(rf"(?:^|\s){word}{number}:", rest)
        if found is None:
            yield rest
            return
        yield rest[: found.start()]
        rest = rest[found.end() :]
