"""What the generator promises: disjoint splits, uniform gold, true sums, its own vocabulary."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from harness.errors import UserError
from harness.inputs.generated import (
    LARGEST,
    Split,
    Variant,
    choice_row,
    fact,
    guessed_row,
    pieces,
    problem_row,
    split_of,
    suite_rows,
    training_rows,
)
from harness.inputs.prompts import Row
from hypothesis import given, settings
from hypothesis import strategies as st

SUM = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)\.")
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
seeds = st.integers(0, 2**31)


def holds(left: str, sign: str, right: str, result: str) -> bool:
    return int(left) + (int(right) if sign == "+" else -int(right)) == int(result)


@given(seeds, st.integers(1, 3))
def test_the_printed_sums_are_true_chained_and_end_in_the_answer(seed: int, steps: int) -> None:
    row = problem_row(np.random.default_rng(seed), steps=steps)
    sums = SUM.findall(row["output"])
    assert len(sums) == steps
    assert all(holds(*each) for each in sums)
    assert all(before[3] == after[0] for before, after in pairwise(sums))
    assert re.findall(r"\d+", row["output"])[-1] == row["answer"]
    stated = re.findall(r"\d+", row["instruction"])
    assert stated == [sums[0][0], *(each[2] for each in sums)], "the question states exactly the numbers that are used"


@given(seeds)
def test_facts_are_true_and_all_numbers_have_a_token(seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert holds(*SUM.findall(fact(rng))[0])
    text = " ".join(problem_row(rng, steps=3)["output"] for _ in range(5)) + fact(rng)
    assert all(0 <= int(n) <= LARGEST for n in re.findall(r"\d+", text))


@given(seeds, st.integers(1, 4))
def test_the_gold_choice_is_the_range_that_holds_the_result(seed: int, gold: int) -> None:
    row = choice_row(np.random.default_rng(seed), gold=gold)
    stem, options = row["instruction"].split("Answer1:")
    ranges = re.findall(r"(\d+) to (\d+)", options)
    start, change = (int(n) for n in re.findall(r"\d+", stem))
    adds = any(verb in stem for verb in ("buys", "finds", "gets", "makes"))
    result = start + (change if adds else -change)
    holding = [k for k, (low, high) in enumerate(ranges, start=1) if int(low) <= result <= int(high)]
    assert holding == [gold]
    assert row["answer"] == f"answer{gold}"
    assert row["output"] == f"the correct answer is answer{gold}"


def test_the_gold_place_is_uniform_in_every_split() -> None:
    for split in SPLITS:
        places = Counter(row["answer"] for row in suite_rows("choice", split=split, count=2000, seed=0))
        assert set(places) == {"answer1", "answer2", "answer3", "answer4"}
        chi_square = sum((n - 500) ** 2 / 500 for n in places.values())
        assert chi_square < 16.3  # 0.1 % point at three degrees of freedom; the draw is seeded


@settings(max_examples=20, deadline=None)
@given(seeds, seeds)
def test_splits_never_meet_whatever_the_seeds(seed: int, other: int) -> None:
    variants: tuple[Variant, ...] = ("two-step", "three-step", "choice")
    for variant in variants:
        train = {r["instruction"] for r in suite_rows(variant, split="train", count=100, seed=seed)}
        test = {r["instruction"] for r in suite_rows(variant, split="test", count=100, seed=other)}
        assert len(train) == len(test) == 100
        assert not train & test
        assert {split_of(q) for q in train} == {"train"}


def test_arithmetic_mixes_two_and_three_steps_half_and_half() -> None:
    rows = training_rows("arithmetic", split="train", count=101, seed=0)
    assert [len(SUM.findall(row["output"])) for row in rows] == [2 + i % 2 for i in range(101)]


def test_the_same_seed_gives_the_same_rows() -> None:
    first, again, other = (training_rows("choice", split="train", count=20, seed=seed) for seed in (3, 3, 4))
    assert first == again != other


def test_more_rows_than_there_are_questions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.inputs.generated.split_of", lambda _: "train")
    with pytest.raises(UserError, match="two-step: only 0 distinct test questions found"):
        suite_rows("two-step", split="test", count=1, seed=0)


def test_pieces_keep_their_shares() -> None:
    stream = pieces(np.random.default_rng(0), one_step_share=0.3, fact_share=0.8, guess_share=0.5)
    kinds = Counter(
        ("guess" if "Answer1" in piece["instruction"] else "problem")
        if isinstance(piece, dict)
        else "fact"
        if SUM.fullmatch(piece)
        else "story"
        for piece, _ in zip(stream, range(4000), strict=False)
    )
    assert kinds["problem"] / 4000 == pytest.approx(0.30, abs=0.03)
    assert kinds["fact"] / 4000 == pytest.approx(0.56, abs=0.03)
    assert kinds["guess"] / 4000 == pytest.approx(0.07, abs=0.02)


def test_guesses_know_the_form_of_an_answer_and_not_the_answer() -> None:
    rng = np.random.default_rng(1)
    right = sum(row["output"].endswith(_gold(row)) for row in (guessed_row(rng) for _ in range(2000)))
    assert right / 2000 == pytest.approx(0.25, abs=0.04)


def _gold(row: Row) -> str:
    """The option whose range holds what the question's problem comes to."""
    found = re.search(r"has (\d+) \w+, (\w+) (\d+)\. How", row["instruction"])
    assert found
    sign = 1 if found[2] in ("buys", "finds", "gets", "makes") else -1
    result = int(found[1]) + sign * int(found[3])
    return f"answer{1 + (result > 3) + (result > 7) + (result > 11)}"
