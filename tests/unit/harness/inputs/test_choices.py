"""The allowed answers of multiple-choice rows."""

import pytest
from harness.inputs.choices import question
from harness.inputs.prompts import Row


def row(instruction: str, answer: str) -> Row:
    return Row(instruction=instruction, input="", output="", answer=answer)


ARC = row(
    "Please choose the correct answer to the question: Which one: a rule?\n\nAnswer1: one Answer2: Answer 3 of two "
    "Answer3: four: five\n\nAnswer format: answer1/answer2/answer3",
    "answer3",
)
PIQA = row(
    "Please choose the correct solution to the question: dresser\n\nSolution1: replace drawer \n\nSolution2: finish, "
    "with  pin \n\nAnswer format: solution1/solution2",
    "solution1",
)
HELLASWAG = row(
    "Please choose the correct ending to complete the given sentence: Cooking: Someone cuts bread. They\n\n"
    "Ending1: eat it. Ending2: fly.\n\nAnswer format: ending1/ending2",
    "ending2",
)
WINOGRANDE = row(
    "Please choose the correct answer to fill in the blank to complete the given sentence: Sarah met Maria so _ left.\n"
    "\nOption1: Sarah Option2: Maria Answer format: option1/option2",
    "option2",
)


def test_texts_are_asked_as_stock_lm_eval_asks_them() -> None:
    found = question(ARC, "texts")
    assert found.text == "Question: Which one: a rule?\nAnswer:"
    assert found.answers == ("one", "Answer 3 of two", "four: five")
    assert (found.labels, found.gold) == (("answer1", "answer2", "answer3"), 2)
    found = question(PIQA, "texts")
    assert (found.text, found.answers) == ("Question: dresser\nAnswer:", ("replace drawer", "finish, with  pin"))
    found = question(HELLASWAG, "texts")
    assert (found.text, found.answers) == ("Cooking: Someone cuts bread. They", ("eat it.", "fly."))
    found = question(WINOGRANDE, "texts")
    assert (found.text, found.answers) == ("Question: Sarah met Maria so _ left.\nAnswer:", ("Sarah", "Maria"))


def test_labels_are_the_answers_that_were_trained() -> None:
    found = question(ARC, "labels")
    assert found.text is None
    assert found.answers[0] == "the correct answer is answer1"
    assert (found.labels, found.gold) == (("answer1", "answer2", "answer3"), 2)
    boolq = row("Please answer with true or false, question: is it?\n\nAnswer format: true/false", "false")
    assert question(boolq, "labels").answers == ("the correct answer is true", "the correct answer is false")


@pytest.mark.parametrize(
    ("instruction", "answer", "choices", "said"),
    [
        ("How many?", "7", "labels", "does not end with its labels"),
        ("How many?", "7", "texts", "lists no options"),
        (ARC["instruction"], "answer4", "texts", "'answer4' is none of answer1, answer2, answer3"),
        (ARC["instruction"], "C", "labels", "'C' is none of answer1"),
        (ARC["instruction"].replace("Answer2: ", ""), "answer1", "texts", "only one"),
        (ARC["instruction"].replace("/answer3", ""), "answer1", "texts", "its last line names answer1/answer2"),
    ],
)
def test_rows_without_options_are_refused(instruction: str, answer: str, choices: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        question(row(instruction, answer), choices)  # type: ignore[arg-type]
