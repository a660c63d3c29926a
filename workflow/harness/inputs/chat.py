"""Conversations as text, through the tokenizer's own chat template.

The template is rendered twice, with the texts and with marks in their place, so that it is known which characters come
from a row and which from the template: control tokens of the template are control tokens, the same characters in a
row's text are text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypedDict

from harness.errors import UserError, first_line

Span = tuple[int, int]
"""Characters from the first to before the second number."""

_MARK = re.compile("( ?)\ue000(\\d+)\ue001( ?)")
_TODAY = datetime(2024, 7, 26)
"""What templates with a date in them are told, so that a run does not depend on its day: Llama 3.1's own default."""


class Message(TypedDict):
    """One turn."""

    role: str
    content: str


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    written: tuple[Span, ...]
    """Where each message's own text stands."""
    answers: tuple[Span, ...] = ()
    """What the model is to write: the assistant's turns, each with its end token."""
    ended: bool = False
    """The text ends with an end-of-turn token."""


class Chat:
    """The chat template of a tokenizer.

    Raises UserError if there is none.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        if not tokenizer.chat_template:
            raise UserError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template; put chat_template into its "
                "tokenizer_config.json, or write another `prompt` in the task (alpaca, plain, llm-adapters)"
            )
        special = {int(i): str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = frozenset(special)
        self._special = re.compile("|".join(map(re.escape, sorted(special.values(), key=len, reverse=True))) or r"(?!)")
        ends = self._tail(self._render(_EXAMPLE, opened=False))
        self.stops = (ends,) if ends else ()

    def question(self, messages: Sequence[Message]) -> Rendered:
        """A conversation up to where the assistant begins to write its next turn."""
        return self._render(messages, opened=True)

    def with_answers(self, messages: Sequence[Message]) -> Rendered:
        """A conversation that ends with the assistant's turn and that turn's end token; each of its turns an answer.

        An answer begins where the prompt for it ends, so what a template writes before a turn's content (an empty
        reasoning block) is learned too if generation has to write it.
        """
        whole = self._render(messages, opened=False)
        answers, last = [], len(messages) - 1
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start, end = whole.written[number]
            asked = self.question(messages[:number]).text
            if whole.text.startswith(asked):
                start = len(asked)
            follows = whole.text[end : whole.written[number + 1][0]] if number < last else whole.text[end:]
            token = self._special.search(follows)
            answers.append((start, end + token.end() if token else end))
        stop = answers[-1][1]
        return Rendered(whole.text[:stop], whole.written, tuple(answers), ended=stop > whole.written[-1][1])

    def tokens(self, rendered: Rendered) -> tuple[list[int], list[Span]]:
        """Token ids, and each token's characters; the template holds every control token, so none is added."""
        plain = self._tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(plain["input_ids"]), [(int(a), int(b)) for a, b in plain["offset_mapping"]]
        if not any(self._special.search(rendered.text[start:end]) for start, end in rendered.written):
            return ids, offsets
        # A row spells a control token: the text between two of the template's is split anew, with none in it.
        kept_ids: list[int] = []
        kept_offsets: list[Span] = []
        begin = 0
        for number, (start, end) in enumerate([*offsets, (len(rendered.text),) * 2]):
            closing = number == len(ids)
            if not closing and (ids[number] not in self._special_ids or _inside(rendered.written, start)):
                continue
            part = self._tokenizer(
                rendered.text[begin:start],
                add_special_tokens=False,
                split_special_tokens=True,
                return_offsets_mapping=True,
            )
            kept_ids += part["input_ids"]
            kept_offsets += [(begin + int(a), begin + int(b)) for a, b in part["offset_mapping"]]
            if not closing:
                kept_ids.append(ids[number])
                kept_offsets.append((start, end))
            begin = end
        return kept_ids, kept_offsets

    def _tail(self, rendered: Rendered) -> str:
        """The control token that the template writes after the last message; the empty string if there is none."""
        token = self._special.search(rendered.text, rendered.written[-1][1])
        return token.group() if token else ""

    def _render(self, messages: Sequence[Message], *, opened: bool) -> Rendered:
        text = self._applied(messages, opened=opened)
        marked = [Message(role=m["role"], content=f" \ue000{n}\ue001 ") for n, m in enumerate(messages)]
        found, spans, last = "", [], 0
        skeleton = self._applied(marked, opened=opened)
        for mark in _MARK.finditer(skeleton):
            left, number, right = mark.groups()
            content = messages[int(number)]["content"]
            content = content if left else content.lstrip()  # some templates strip what they are given
            content = content if right else content.rstrip()
            found += skeleton[last : mark.start()]
            spans.append((len(found), len(found) + len(content)))
            found, last = found + content, mark.end()
        found += skeleton[last:]
        if found != text or len(spans) != len(messages):
            raise UserError(
                f"{self._tokenizer.name_or_path}: its chat template does not write every message as it stands, so the "
                f"answers cannot be told from the rest (first message: {messages[0]['content'][:60]!r}); mend the "
                "template or the row, or write another `prompt` in the task"
            )
        return Rendered(text, tuple(spans))

    def _applied(self, messages: Sequence[Message], *, opened: bool) -> str:
        from jinja2 import TemplateError

        try:
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=opened, strftime_now=_TODAY.strftime
                )
            )
        except (TemplateError, ValueError) as error:  # ValueError: several templates, and none is the default
            roles = ", ".join(message["role"] for message in messages)
            raise UserError(
                f"{self._tokenizer.name_or_path}: its chat template refuses a conversation of {roles} "
                f"({first_line(error)}); mend the rows, or write another `prompt` in the task"
            ) from error


_EXAMPLE = [Message(role="user", content="question"), Message(role="assistant", content="answer")]


def _inside(spans: tuple[Span, ...], place: int) -> bool:
    return any(start <= place < end for start, end in spans)
