"""How a row becomes text: the prompts that a task can name, the same one in training, held-out loss and scoring.

`llm-adapters`: the published templates; facts in `reference/llm-adapters-protocol.md`, section 1. Their training and
evaluation strings are NOT the same: after the first sentence training has one space more than evaluation, and the line
between two blocks holds sixteen spaces in training and is empty in evaluation. Both are kept as published; whether the
tokens differ depends on the tokenizer. `alpaca`: Stanford Alpaca's two templates, with a line break after the last
mark. `plain`: question and answer, ours. `chat`: the tokenizer's own template, see `harness.inputs.chat`.

A row's text is text: characters that spell a special token (`</s>`, `<|im_end|>`) are split like any others, and only
the tokenizer and a chat template put control tokens into a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from harness.errors import UserError
from harness.inputs.chat import Chat, Message, Span
from harness.study.spec import PromptName

TASK_SENTENCE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
INPUT_SENTENCE = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
INSTRUCTION_MARK = "### Instruction:"
INPUT_MARK = "### Input:"
RESPONSE_MARK = "### Response:"
QUESTION_MARK = "Question:"
ANSWER_MARK = "Answer:"

# The published source is a triple-quoted string inside an indented function: its indentation is part of the prompt.
_INDENT = " " * 16


class Row(TypedDict):
    """One row. Only `answer` is the gold answer; `output` is what training is to write, and may be a rationale."""

    instruction: str
    input: str
    """What the instruction is about; the empty string where it stands by itself."""
    output: str
    answer: str
    messages: NotRequired[list[Message]]
    """A conversation: `instruction` then holds the user's turns, `output` the last turn, which is the assistant's."""


@dataclass(frozen=True)
class Tokens:
    """A text as tokens."""

    ids: list[int]
    answer: list[bool]
    """Whether a token covers at least one character that the model is to write."""
    ended: bool
    """The text ends with an end token of its own: nothing has to be appended."""


def training_prompt(instruction: str, context: str = "") -> str:
    """`llm-adapters`: all text before the output in training, including the sixteen spaces directly before it."""
    first = f"{INPUT_SENTENCE} " if context else f"{TASK_SENTENCE}  "
    return _published(first, instruction, context, between=_INDENT)


def evaluation_prompt(instruction: str, context: str = "") -> str:
    """`llm-adapters`: what an answer is generated from; it ends with a line break and sixteen spaces."""
    first = INPUT_SENTENCE if context else f"{TASK_SENTENCE} "
    return _published(first, instruction, context, between="")


def _published(first: str, instruction: str, context: str, *, between: str) -> str:
    blocks = [(INSTRUCTION_MARK, instruction), *([(INPUT_MARK, context)] if context else []), (RESPONSE_MARK, "")]
    return f"{first}\n\n" + f"\n{between}\n".join(f"{_INDENT}{mark}\n{_INDENT}{text}" for mark, text in blocks)


def _alpaca(row: Row) -> str:
    first = INPUT_SENTENCE if row["input"] else TASK_SENTENCE
    context = f"{INPUT_MARK}\n{row['input']}\n\n" if row["input"] else ""
    return f"{first}\n\n{INSTRUCTION_MARK}\n{row['instruction']}\n\n{context}{RESPONSE_MARK}\n"


def user_text(row: Row) -> str:
    """Instruction and, on its own line, the input."""
    return f"{row['instruction']}\n{row['input']}" if row["input"] else row["instruction"]


class Prompt:
    """How a row becomes text: one object in training, held-out loss and scoring.

    Args:
        name: as in a task's `prompt`.
        tokenizer: of the model; its chat template is the prompt `chat`.

    Raises:
        UserError: `chat`, and the tokenizer has no chat template.
    """

    stops: tuple[str, ...]
    """Texts at which a continuation ends, beside the end token."""
    adds_special_tokens: bool
    """Whether the tokenizer puts its own beginning-of-text token before the text; a chat template holds it already."""

    def __init__(self, name: PromptName, tokenizer: Any) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.adds_special_tokens = name != "chat"
        self._chat = Chat(tokenizer) if name == "chat" else None
        self.stops = _STOPS[name] if self._chat is None else self._chat.stops

    def training(self, row: Row) -> str:
        """All text before the output in training."""
        if self._chat is not None:
            whole = self._chat.with_answers(_conversation(row))
            return whole.text[: whole.answers[-1][0]]
        if self.name == "alpaca":
            return _alpaca(_single_turn(row, self.name))
        if self.name == "plain":
            return f"{self.evaluation(row)} "
        return training_prompt(_single_turn(row, self.name)["instruction"], row["input"])

    def evaluation(self, row: Row) -> str:
        """The text that an answer is generated from."""
        if self._chat is not None:
            return self._chat.question(_conversation(row)[:-1]).text
        if self.name == "alpaca":
            return _alpaca(_single_turn(row, self.name))
        if self.name == "plain":
            return f"{QUESTION_MARK} {user_text(_single_turn(row, self.name))}\n{ANSWER_MARK}"
        return evaluation_prompt(_single_turn(row, self.name)["instruction"], row["input"])

    def training_tokens(self, row: Row) -> Tokens:
        """A row with its output, as one text, tokenised once; characters are found through the tokenizer's offsets."""
        if self._chat is not None:
            text = self._chat.with_answers(_conversation(row))
            ids, offsets = self._chat.tokens(text)
            return Tokens(ids, [_covers(text.answers, span) for span in offsets], ended=text.ended)
        prompt = self.training(row)
        whole = self.tokenizer(prompt + row["output"], return_offsets_mapping=True, split_special_tokens=True)
        ids, ends = list(whole["input_ids"]), [end for _, end in whole["offset_mapping"]]
        ended = bool(ids) and ids[-1] == self.tokenizer.eos_token_id  # some tokenizers append it themselves
        return Tokens(ids, [end > len(prompt) for end in ends[:-1]] + [ended or ends[-1] > len(prompt)], ended=ended)

    def evaluation_tokens(self, row: Row) -> list[int]:
        """`evaluation` as tokens, the tokenizer's own beginning of text included; what a row spells stays text."""
        if self._chat is not None:
            return self._chat.tokens(self._chat.question(_conversation(row)[:-1]))[0]
        ids = list(self.tokenizer(self.evaluation(row), split_special_tokens=True)["input_ids"])
        return ids[:-1] if ids[-1] == self.tokenizer.eos_token_id else ids  # some tokenizers append it themselves


_STOPS: dict[str, tuple[str, ...]] = {
    "llm-adapters": (),  # published: the end token alone; what follows a second response mark is not scored
    "alpaca": (f"\n{INSTRUCTION_MARK}", f"\n{RESPONSE_MARK}"),
    "plain": (f"\n{QUESTION_MARK}",),
}


def _covers(spans: tuple[Span, ...], token: Span) -> bool:
    return any(token[0] < end and token[1] > start for start, end in spans)


def _single_turn(row: Row, name: str) -> Row:
    if "messages" in row:
        raise UserError(f"prompt {name}: the rows are conversations (`messages`); write `prompt: chat` in the task")
    return row


def _conversation(row: Row) -> list[Message]:
    if "messages" in row:
        return row["messages"]
    return [Message(role="user", content=user_text(row)), Message(role="assistant", content=row["output"])]
