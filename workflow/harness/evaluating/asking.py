"""How test rows are put to a model: the prompt that the run was trained with, perhaps after worked examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.inputs.chat import Message
from harness.inputs.prompts import TASK_SENTENCE, Prompt, Row, user_text

BETWEEN = "\n\n"
"""Between two worked examples and before the question, where they are one text."""
_OPENING = TASK_SENTENCE.partition(".")[0]
"""How both templates begin, with an `input` or without: there a model that goes on writes the next example."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """A prompt with worked examples before every question; none are the prompt alone.

    In the chat prompt the examples are turns of the conversation. In the others they are text: each in the prompt's own
    evaluation template, then its output.
    """

    prompt: Prompt
    examples: Sequence[Row] = ()

    def text(self, row: Row) -> str:
        """All that stands before the answer."""
        if self.prompt.name == "chat":
            return self.prompt.evaluation(self._conversation(row))
        return "".join(
            f"{self.prompt.evaluation(example)}{self.delimiter(example)}{example['output']}{BETWEEN}"
            for example in self.examples
        ) + self.prompt.evaluation(row)

    def tokens(self, row: Row) -> list[int]:
        """The same as tokens, the beginning of text included; what a row spells stays text."""
        if self.prompt.name == "chat":
            return self.prompt.evaluation_tokens(self._conversation(row))
        if not self.examples:
            return self.prompt.evaluation_tokens(row)
        return list(self.prompt.tokenizer(self.text(row), split_special_tokens=True)["input_ids"])

    def delimiter(self, row: Row) -> str:
        """What training writes between the evaluation prompt and the output: a space, or nothing."""
        whole, question = self.prompt.training(row), self.prompt.evaluation(row)
        return whole.removeprefix(question) if whole.startswith(question) else ""

    @property
    def stops(self) -> list[str]:
        """Texts at which a continuation ends, beside the end token."""
        stops = list(self.prompt.stops)
        if self.examples and self.prompt.name in {"llm-adapters", "alpaca"}:
            stops.append(_OPENING)
        # the prompt ends with a line break: a mark at the very beginning of the answer has none before it
        return [*stops, *(stop.lstrip("\n") for stop in stops if self.prompt.name == "alpaca" and stop[0] == "\n")]

    def record(self) -> dict[str, Any]:
        """Prompt, stops and examples, for the record."""
        return {
            "prompt": self.prompt.name,
            "stop_strings": self.stops,
            "shots": len(self.examples),
            "shots_from": "the first training rows of the task, in their order" if self.examples else None,
        }

    def _conversation(self, row: Row) -> Row:
        if not self.examples:
            return row
        turns = [turn for one in (*self.examples, row) for turn in _turns(one)]
        return Row(**{**row, "messages": turns})


def _turns(row: Row) -> list[Message]:
    if "messages" in row:
        return row["messages"]
    return [Message(role="user", content=user_text(row)), Message(role="assistant", content=row["output"])]
