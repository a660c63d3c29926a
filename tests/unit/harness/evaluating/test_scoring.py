"""The extraction rules of the llm-adapters protocol, on worked examples and on the published files."""

import json
import re

import pytest
from harness.evaluating.suite_score import chance
from harness.inputs.overlap import normalised
from harness.tasks.protocol import check_gold, extract, is_correct, kept_text, score
from house import SHARED

DATASETS = SHARED / "data" / "llm-adapters" / "dataset"
needs_shared = pytest.mark.skipif(
    not DATASETS.is_dir(), reason="the published data files are not beside the repository"
)


@pytest.mark.parametrize(
    ("text", "prediction"),
    [
        ("8 - 2 = 6.", "6."),
        ("3 apples and then 7", "7"),
        ("the answer is -4", "-4"),
        ("3-5", "-5"),
        ("1/2", "2"),
        ("1e5", "5"),
        ("it costs 1,234,567 dollars", "1234567"),
        ("3,5", "35"),
        ("18.", "18."),
        ("0.25", "0.25"),
        (".5", "5"),
        ("50%", "50"),
        ("1.2.3", "3"),
        ("none at all", None),
        ("", None),
    ],
)
def test_the_last_number_is_taken_after_commas_are_deleted(text: str, prediction: str | None) -> None:
    assert extract("number", text) == prediction


@pytest.mark.parametrize(
    ("rule", "text", "prediction"),
    [
        ("letter", "Because it is (D)", "B"),
        ("letter", "Each of them", "E"),
        ("letter", "the answer is c, or rather D", "D"),
        ("letter", "F, then X", None),
        ("letter", "FACE", "A"),
        ("true_false", "untrue", "true"),
        ("true_false", "the correct answer is false, not true", "false"),
        ("true_false", "True", None),
        ("answer", "answer1 or answer2", "answer1"),
        ("answer", "the correct answer is answer3", "answer3"),
        ("answer", "answer12", "answer1"),
        ("answer", "answer5", "answer5"),
        ("answer", "answer6", None),
        ("answer", "Answer2", None),
        ("answer", "answer 2", None),
        ("solution", "not solution2 but solution1", "solution2"),
        ("solution", "solution3", None),
        ("ending", "ending4", "ending4"),
        ("ending", "ending5 ending2", "ending2"),
        ("option", "suboption2", "option2"),
        ("option", "option3", None),
    ],
)
def test_other_rules_take_the_first_match(rule: str, text: str, prediction: str | None) -> None:
    assert extract(rule, text) == prediction


@pytest.mark.parametrize(
    ("prediction", "gold", "right"),
    [
        ("18.", "18.0", True),
        ("18.0009", "18", True),
        ("17.9991", "18", True),
        ("18.002", "18", False),
        ("-5", "5", False),
        ("1.833", "1.8333333333333335", True),
        ("9" * 400, "9", False),
        (None, "0", False),
    ],
)
def test_numbers_may_differ_by_a_thousandth(prediction: str | None, gold: str, right: bool) -> None:
    assert is_correct("number", prediction, gold) is right


def test_other_answers_must_be_equal() -> None:
    assert is_correct("letter", "A", "A")
    assert not is_correct("answer", "answer1", "answer2")
    assert not is_correct("true_false", None, "true")


def test_text_kept_ends_at_the_next_response_mark() -> None:
    assert kept_text("\n  6.\n\n### Response:\n 7 ### Response: 8") == "6."
    assert kept_text(" 6 ### Instruction: 7") == "6 ### Instruction: 7"
    assert score("number", {"answer": "6"}, [" 6.\n\n### Response:\n 7"]) == {"acc": 1.0, "parsed": 1.0}


def test_a_wrong_answer_is_parsed_and_a_missing_one_is_not() -> None:
    assert score("option", {"answer": "option1"}, ["option2"]) == {"acc": 0.0, "parsed": 1.0}
    assert score("option", {"answer": "option1"}, ["neither"]) == {"acc": 0.0, "parsed": 0.0}


@pytest.mark.parametrize(
    ("rule", "gold", "near"),
    [
        ("number", "answer1", None),
        ("number", "nan", None),
        ("number", "inf", None),
        ("number", "", None),
        ("number", "1,000", "1000"),
        ("number", "$ 2.50", "2.50"),
        ("letter", "AB", None),
        ("letter", "b", "B"),
        ("answer", "answer6", None),
        ("true_false", "True", "true"),
        ("ending", "2", None),
    ],
)
def test_a_gold_answer_that_nothing_can_equal_is_refused(rule: str, gold: str, near: str | None) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(gold))) as caught:
        check_gold(rule, gold)
    assert str(caught.value).endswith(f": write {near!r}") == (near is not None)
    if near is not None:
        check_gold(rule, near)
        assert is_correct(rule, extract(rule, near), near)


def _row(instruction: str) -> dict[str, str]:
    return {"instruction": instruction, "input": "", "output": "", "answer": "answer1"}


def test_chance_of_answers_is_averaged_over_the_options_of_each_row() -> None:
    two = _row("Which? Answer1: x Answer2: y\n\nAnswer format: answer1/answer2")
    four = _row("Which? answer5\n\nAnswer format: answer1/answer2/answer3/answer4")
    assert chance("answer", [two, four]) == pytest.approx((1 / 2 + 1 / 4) / 2)
    assert chance("answer", [two, _row("Which?")]) is None
    assert chance("number", [two]) is None
    assert [chance(rule, [two]) for rule in ("letter", "true_false", "solution", "ending", "option")] == [
        0.2, 0.5, 0.5, 0.25, 0.5,
    ]  # fmt: skip


def test_normalised_text_keeps_letters_digits_and_decimal_points() -> None:
    assert normalised("  Ann's  cup holds 0.5 l, not 5 l . \n") == "ann s cup holds 0.5 l not 5 l"
    assert normalised("Ann 's cup .") == normalised("Ann's cup.")
    assert normalised("has 3.5 apples.") != normalised("has 35 apples")


def _read(name: str) -> list[dict[str, str]]:
    return json.loads((DATASETS / name).read_text(encoding="utf-8"))


@needs_shared
@pytest.mark.parametrize(
    ("suite", "rule", "right", "rows"), [("gsm8k", "number", 771, 1319), ("AQuA", "letter", 109, 254)]
)
def test_counts_on_stored_rationales(suite: str, rule: str, right: int, rows: int) -> None:
    documents = _read(f"{suite}/test.json")
    assert len(documents) == rows
    assert sum(is_correct(rule, extract(rule, kept_text(d["output"])), d["answer"]) for d in documents) == right


@needs_shared
@pytest.mark.parametrize(
    ("suite", "rule"),
    [
        ("boolq", "true_false"), ("piqa", "solution"), ("social_i_qa", "answer"), ("winogrande", "option"),
        ("ARC-Easy", "answer"), ("ARC-Challenge", "answer"), ("openbookqa", "answer"),
    ],
)  # fmt: skip
def test_published_reference_outputs_score_full_marks(suite: str, rule: str) -> None:
    documents = _read(f"{suite}/test.json")
    assert all(score(rule, d, [d["output"]]) == {"acc": 1.0, "parsed": 1.0} for d in documents)
    assert chance(rule, documents) is not None


@needs_shared
@pytest.mark.parametrize(("suite", "leaked"), [("MultiArith", 452), ("AddSub", 327), ("SingleEq", 416), ("SVAMP", 0)])
def test_known_overlaps_with_the_mawps_training_split(suite: str, leaked: int) -> None:
    trained = {normalised(row["original_text"]) for row in _read("mawps/trainset.json")}
    assert sum(normalised(d["instruction"]) in trained for d in _read(f"{suite}/test.json")) == leaked
