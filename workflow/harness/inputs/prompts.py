"""The record format and the prompt template of LLM-Adapters, short form.

Facts: `reference/llm-adapters-protocol.md`, section 1. Training and evaluation template are NOT the same string:
after "request." training has two spaces and evaluation one, and the line before "### Response:" holds sixteen spaces in
training and is empty in evaluation. Both are kept as published; whether the tokens differ depends on the tokenizer.
"""

from __future__ import annotations

from typing import TypedDict

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
