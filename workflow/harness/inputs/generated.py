"""Seeded generator of the embedded study: word problems, multiple choice, and text to pretrain on.

Two task families in LLM-Adapters format. `arithmetic`: word problems of two or three steps with a worked solution whose
last number is the answer. `choice`: in which of four ranges does the result of a one-step problem lie? The options are
the same in every question, because a model this small does not learn in a minute to find a number in a list.
Pretraining covers parts of both tasks (facts, one-step problems) but neither whole task, so that fine-tuning adapts
partial knowledge, as real fine-tuning does. Texts are short, since the whole study runs on two cores.

Whether a question may be used for training, validation or testing is decided by a hash of its text: sets drawn with
different seeds never share a question across splits.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from harness.errors import UserError
from harness.inputs.prompts import Row

Split = Literal["train", "validation", "test"]
Variant = Literal["two-step", "three-step", "choice"]
Family = Literal["arithmetic", "choice"]

LARGEST = 40
"""Numbers run from 0 to this; each is one token."""

_STEP = 9
"""Largest number a problem starts from, adds or takes away."""
_FACT_START = 27
"""Largest left operand of a fact: the largest number that a three-step problem can reach before its last step."""

_NAMES = ("Ann", "Bob", "Eva", "Ian", "Joe", "Kim", "Lea", "Max")
_THINGS = ("apples", "books", "cards", "coins", "eggs", "keys", "pens", "shells")
_GAINS = ("buys", "finds", "gets", "makes")
_LOSSES = ("drops", "loses", "sells", "uses")
_PLACES = ("garden", "house", "market", "school")
_COLOURS = ("blue", "green", "old", "red")
_STORY_WORDS = ("and", "goes", "have", "in", "is", "likes", "plays", "the", "to", "with")

ASKED = "How many now?"
CHOICE_OPENING = "Please choose the correct answer to the question:"
CHOICE_OPTIONS = "Answer1: 0 to 3 Answer2: 4 to 7 Answer3: 8 to 11 Answer4: 12 to 18"
CHOICE_FORMAT = "Answer format: answer1/answer2/answer3/answer4"
CHOICE_OUTPUT = "the correct answer is"

_RANGES = (range(4), range(4, 8), range(8, 12), range(12, 19))
"""Ranges that the options name: one-step results fall into each of the four about equally often."""

_STEPS: dict[Variant, int] = {"two-step": 2, "three-step": 3}
_TRIES = 10_000
"""Tries to draw one new question before the requested set counts as too large."""

_TRAIN_VARIANTS: dict[Family, tuple[Variant, ...]] = {"arithmetic": ("two-step", "three-step"), "choice": ("choice",)}


def words() -> list[str]:
    """Every word, number and punctuation mark of generated text, each once, without the fixed phrases."""
    labels = [f"answer{k}" for k in range(1, 5)]
    listed = (_NAMES, _THINGS, _GAINS, _LOSSES, _PLACES, _COLOURS, _STORY_WORDS, labels)
    numbers = [str(n) for n in range(LARGEST + 1)]
    return [*numbers, *"+-=.,", "has", *(word for group in listed for word in group)]


def split_of(question: str) -> Split:
    """The only split a question may be used in: eight tenths training, one tenth validation, one tenth test."""
    bucket = zlib.crc32(question.encode()) % 10
    return "train" if bucket < 8 else "validation" if bucket == 8 else "test"


def training_rows(family: Family, *, split: Split, count: int, seed: int) -> list[Row]:
    """`count` distinct rows of a family; arithmetic alternates two-step and three-step problems, half each."""
    variants = _TRAIN_VARIANTS[family]
    shares = [(count + len(variants) - 1 - k) // len(variants) for k in range(len(variants))]
    parts = [suite_rows(variant, split=split, count=n, seed=seed) for variant, n in zip(variants, shares, strict=True)]
    return [parts[i % len(parts)][i // len(parts)] for i in range(count)]


def suite_rows(variant: Variant, *, split: Split, count: int, seed: int) -> list[Row]:
    """`count` rows of one variant with distinct questions, all of which belong to `split`.

    Raises UserError if the generator has too few distinct questions.
    """
    rng = np.random.default_rng([seed, zlib.crc32(f"{variant}/{split}".encode())])
    found: dict[str, Row] = {}
    while len(found) < count:
        # The gold option is drawn before the question, and kept until a new question is found: it stays uniform.
        gold = int(rng.integers(1, 5))
        for _ in range(_TRIES):
            row = choice_row(rng, gold=gold) if variant == "choice" else problem_row(rng, steps=_STEPS[variant])
            if split_of(row["instruction"]) == split and row["instruction"] not in found:
                found[row["instruction"]] = row
                break
        else:
            raise UserError(
                f"{variant}: only {len(found)} distinct {split} questions found; ask for fewer than {count} rows"
            )
    return list(found.values())


def problem_row(rng: np.random.Generator, *, steps: int) -> Row:
    """One word problem; `output` is one printed sum a step, and its last number is `answer`.

    >>> "Ann has 3 apples, finds 5, sells 2. How many now?"  ->  "3 + 5 = 8. 8 - 2 = 6."
    """
    name, thing = _pick(rng, _NAMES), _pick(rng, _THINGS)
    total = int(rng.integers(1, _STEP + 1))
    question, sums = f"{name} has {total} {thing}", []
    for _ in range(steps):
        sign, amount, result = _change(rng, total)
        question += f", {_pick(rng, _GAINS if sign == '+' else _LOSSES)} {amount}"
        sums.append(f"{total} {sign} {amount} = {result}.")
        total = result
    return Row(instruction=f"{question}. {ASKED}", input="", output=" ".join(sums), answer=str(total))


def choice_row(rng: np.random.Generator, *, gold: int) -> Row:
    """A one-step problem whose result lies in the range that option `gold` (1 to 4) names."""
    while True:
        problem = problem_row(rng, steps=1)
        if int(problem["answer"]) in _RANGES[gold - 1]:
            break
    return Row(
        instruction=f"{CHOICE_OPENING} {problem['instruction']}\n\n{CHOICE_OPTIONS}\n\n{CHOICE_FORMAT}",
        input="",
        output=f"{CHOICE_OUTPUT} answer{gold}",
        answer=f"answer{gold}",
    )


def fact(rng: np.random.Generator) -> str:
    """One true sum over the numbers that problems can reach: `12 + 7 = 19.`"""
    left = int(rng.integers(0, _FACT_START + 1))
    sign, amount, result = _change(rng, left)
    return f"{left} {sign} {amount} = {result}."


def story(rng: np.random.Generator) -> str:
    """Two sentences without sums."""
    first, second = _pick(rng, _NAMES), _pick(rng, _NAMES)
    sentences = (
        f"{first} likes the {_pick(rng, _COLOURS)} {_pick(rng, _THINGS)}.",
        f"{first} goes to the {_pick(rng, _PLACES)} with {second}.",
        f"{second} plays in the {_pick(rng, _COLOURS)} {_pick(rng, _PLACES)}.",
        f"{first} and {second} have {_pick(rng, _COLOURS)} {_pick(rng, _THINGS)}.",
    )
    chosen = rng.permutation(len(sentences))[:2]
    return " ".join(sentences[i] for i in chosen)


def guessed_row(rng: np.random.Generator) -> Row:
    """A multiple-choice question with a random answer: it teaches the format and the words, but not the skill.

    Real pretraining also covers the words of a format. Without such rows, the words of the answers would have untrained
    rows in embedding and head, and a method that trains neither could not produce them.
    """
    question, answer = choice_row(rng, gold=int(rng.integers(1, 5))), f"answer{rng.integers(1, 5)}"
    return Row(instruction=question["instruction"], input="", output=f"{CHOICE_OUTPUT} {answer}", answer=answer)


def pieces(
    rng: np.random.Generator, *, one_step_share: float, fact_share: float, guess_share: float
) -> Iterator[str | Row]:
    """Endless pretraining text: questions as rows (to be put into the template or not), the rest as text."""
    while True:
        if rng.random() < one_step_share:
            yield problem_row(rng, steps=1)
        elif rng.random() < fact_share:
            yield fact(rng)
        elif rng.random() < guess_share:
            yield guessed_row(rng)
        else:
            yield story(rng)


def _change(rng: np.random.Generator, total: int) -> tuple[str, int, int]:
    """A sign, an amount of at least 1, and the result, which is never below 0."""
    if total > 0 and rng.random() < 0.5:
        amount = int(rng.integers(1, min(_STEP, total) + 1))
        return "-", amount, total - amount
    amount = int(rng.integers(1, _STEP + 1))
    return "+", amount, total + amount


def _pick(rng: np.random.Generator, values: Sequence[str]) -> str:
    return values[int(rng.integers(len(values)))]
