"""The record format and the prompt template of LLM-Adapters, short form.

Facts: `reference/llm-adapters-protocol.md`, section 1. Training and evaluation template are NOT the same string:
after "request." training has two spaces and evaluation one, and the line before "### Response:" holds sixteen spaces in
training and is empty in evaluation. Both are kept as published; whether the tokens differ depends on the tokenizer.
"""

from __future__ import annotations

from typing import Any, TypedDict

from harness.study.spec import PromptName

TASK_SENTENCE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
INSTRUCTION_MARK = "### Instruction:"
RESPONSE_MARK = "### Response:"

# The published source is a triple-quoted string inside an indented function: its indentation is part of the prompt.
_INDENT = " " * 16


class Row(TypedDict):
    """One row in LLM-Adapters format. `input` is always the empty string; only `answer` is the gold answer."""

    instruction: str
    input: str
    output: str
    answer: str


def training_prompt(instruction: str) -> str:
    """All text before the output in training, including the sixteen spaces directly before it."""
    return (
        f"{TASK_SENTENCE}  \n\n"
        f"{_INDENT}{INSTRUCTION_MARK}\n"
        f"{_INDENT}{instruction}\n"
        f"{_INDENT}\n"
        f"{_INDENT}{RESPONSE_MARK}\n"
        f"{_INDENT}"
    )


def evaluation_prompt(instruction: str) -> str:
    """The prompt an answer is generated from; it ends with a line break and sixteen spaces."""
    return (
        f"{TASK_SENTENCE} \n\n"
        f"{_INDENT}{INSTRUCTION_MARK}\n"
        f"{_INDENT}{instruction}\n"
        "\n"
        f"{_INDENT}{RESPONSE_MARK}\n"
        f"{_INDENT}"
    )


class Prompt:
    """How a row becomes text: one object in training, held-out loss and scoring.

    Args:
        name: as in a task's `prompt`.
        tokenizer: of the model; its chat template is the prompt `chat`.
    """

    stops: tuple[str, ...] = ()
    """Texts at which a continuation ends, beside the end token."""
    adds_special_tokens = True
    """Whether the tokenizer puts its own beginning-of-text token before the text; a chat template holds it already."""

    def __init__(self, name: PromptName, tokenizer: Any) -> None:
        self.name = name

    def training(self, row: Row) -> str:
        """All text before the output in training."""
        return training_prompt(row["instruction"])

    def evaluation(self, row: Row) -> str:
        """The text that an answer is generated from."""
        return evaluation_prompt(row["instruction"])
