"""Rows from the values of a file or a data set: by named columns, or of LLM-Adapters, Alpaca, chat or GSM8K form."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.inputs.chat import Message
from harness.inputs.files import read_values
from harness.inputs.prompts import Row, user_text
from harness.study.sources import Columns

__all__ = ["Row", "fits", "read_rows", "rows_of"]

ROLES = ("system", "user", "assistant")

_CALCULATOR = re.compile(r"<<[^>]*>>")
_COLUMN = re.compile(r"\{([^{}]*)\}")
_WHOLE = 2**53
"""Up to this size a floating-point number holds every whole one."""


def read_rows(path: Path, columns: Columns | None = None) -> list[Row]:
    """Rows of a file (`harness.inputs.files` says of which kinds), in its order; see `rows_of`."""
    return rows_of(read_values(path), columns)


def rows_of(values: Iterable[tuple[str, Any]], columns: Columns | None = None) -> list[Row]:
    """Rows made of plain values, each given with its place.

    Without `columns`, a row's own fields say what it is. `messages`: a conversation, which ends with the assistant's
    turn. `question` and `answer`: GSM8K; the calculator marks `<<...>>` are taken out of the rationale and the last
    line `#### N` becomes "The answer is N.", so that the last number of the output is the answer; `answer` is N
    without thousands commas. Otherwise `instruction`, `input` (may be absent), `output` and `answer` (each by default
    the other) as LLM-Adapters and Alpaca write them, and `history`, earlier pairs of question and answer, which make a
    row a conversation. Numbers become text as JSON writes them, whole ones without a point: 2.0 is "2".

    Raises:
        UserError: one line that names place and field: a missing one, with those that exist; a value that is no text;
            half a surrogate pair, which no tokenizer and no file can take; an instruction that is empty.
    """
    made = _by_fields if columns is None else _by_columns(columns)
    rows = []
    for where, value in values:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: a row is a set of named fields, found {type(value).__name__}")
        rows.append(made(value, where))
    return rows


def fits(columns: Columns, values: Sequence[tuple[str, Any]]) -> bool:
    """Whether the first value has every column that is named."""
    names = {name for _, wanted in columns if wanted is not None for name in _COLUMN.findall(wanted) or [wanted]}
    return bool(values) and isinstance(values[0][1], Mapping) and names <= values[0][1].keys()


def _by_columns(columns: Columns) -> Callable[[Mapping[str, Any], str], Row]:
    talk = columns.messages
    wanted = {field: name for field, name in columns if name is not None and field != "messages"}

    def made(value: Mapping[str, Any], where: str) -> Row:
        fields = {field: _filled(value, name, where) for field, name in wanted.items()}
        if talk is None:
            return _single(fields, where)
        return _conversation(_messages(_value(value, talk, where), where, talk), fields.get("answer"))

    return made


def _filled(value: Mapping[str, Any], wanted: str, where: str) -> str:
    """The text of one column, or a text with columns in it, filled in."""
    if not _COLUMN.search(wanted):
        return _text(_value(value, wanted, where), where, wanted)
    return _COLUMN.sub(lambda name: _text(_value(value, name[1], where), where, name[1]), wanted)


def _value(value: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in value:
        raise UserError(f"{where}: no column {name!r}, there are {_shown(value)}; correct `columns`")
    return value[name]


def _by_fields(value: Mapping[str, Any], where: str) -> Row:
    fields = {
        key: _text(value[key], where, key) for key in ("instruction", "input", "output", "answer") if key in value
    }
    if value.get("messages") is not None:
        return _conversation(_messages(value["messages"], where, "messages"), fields.get("answer"))
    if "instruction" not in value and {"question", "answer"} <= value.keys():
        return _gsm8k(_text(value["question"], where, "question"), fields["answer"], where)
    if "instruction" not in fields or not {"output", "answer"} & fields.keys():
        missing = "instruction" if "instruction" not in fields else "output"
        raise UserError(
            f"{where}: no field {missing!r}, there are {_shown(value)}; say with `columns` what holds instruction, "
            "input, output and answer, or `messages`"
        )
    row = _single(fields, where)
    if not value.get("history"):
        return row
    turns = [*_history(value["history"], where), ("user", user_text(row)), ("assistant", row["output"])]
    return _conversation([Message(role=role, content=text) for role, text in turns], row["answer"])


def _single(fields: Mapping[str, str], where: str) -> Row:
    if not fields["instruction"].strip():
        raise UserError(f"{where}: the instruction is empty; fill it or remove the row")
    output, answer = fields.get("output"), fields.get("answer")
    return Row(
        instruction=fields["instruction"],
        input=fields.get("input", ""),
        output=str(answer if output is None else output),
        answer=str(output if answer is None else answer),
    )


def _conversation(turns: list[Message], answer: str | None) -> Row:
    asked = "\n".join(turn["content"] for turn in turns if turn["role"] == "user")
    output = turns[-1]["content"]
    return Row(instruction=asked, input="", output=output, answer=output if answer is None else answer, messages=turns)


def _messages(value: Any, where: str, name: str) -> list[Message]:
    if not isinstance(value, list):
        raise UserError(f"{where}: field {name!r} is {type(value).__name__}, expected a list of role and content")
    turns = []
    for number, turn in enumerate(value, start=1):
        at = f"{name!r}, message {number}"
        if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
            raise UserError(f"{where}: field {at}: no role and content; a message is {{role: user, content: text}}")
        if turn["role"] not in ROLES:
            raise UserError(f"{where}: field {at}: role {turn['role']!r} is none of {', '.join(ROLES)}; remove the row")
        more = [key for key, held in turn.items() if key not in ("role", "content") and held]
        if more:
            raise UserError(f"{where}: field {at}: {_shown(more)} cannot be trained on; remove the row")
        content = _text(turn["content"], where, f"{name}, message {number}")
        if not content.strip():
            raise UserError(f"{where}: field {at} is empty; fill it or remove the row")
        turns.append(Message(role=turn["role"], content=content))
    if not turns or turns[-1]["role"] != "assistant" or not any(turn["role"] == "user" for turn in turns):
        raise UserError(
            f"{where}: field {name!r} must hold a user's turn and end with the assistant's, which is what is trained; "
            "mend or remove the row"
        )
    return turns


def _history(value: Any, where: str) -> list[tuple[str, str]]:
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise UserError(f"{where}: field 'history' is no list of pairs, question and answer; mend or remove it")
    names = ("user", "assistant")
    return [(role, _text(text, where, "history")) for pair in value for role, text in zip(names, pair, strict=True)]


def _gsm8k(question: str, solution: str, where: str) -> Row:
    rationale, mark, final = solution.rpartition("####")
    if not mark:
        raise UserError(
            f"{where}: field 'answer' has no '#### N' at its end, as GSM8K's have; add the final number, or say with "
            "`columns` what holds instruction and output"
        )
    answer = final.strip().replace(",", "")
    worked = _CALCULATOR.sub("", rationale).strip()
    output = f"{worked}\nThe answer is {answer}.".lstrip()
    return _single({"instruction": question, "output": output, "answer": answer}, where)


def _text(value: Any, where: str, name: str) -> str:
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = ascii(value[error.start]).strip("'")
            raise UserError(
                f"{where}: field {name!r}: character {error.start + 1} is half a surrogate pair ({half}), which is no "
                "text; write the whole character or remove it"
            ) from None
        return value
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() and abs(value) < _WHOLE else repr(value)
    what = str(value) if isinstance(value, float) else type(value).__name__
    raise UserError(f"{where}: field {name!r} is {what}, expected text: put it in quotes")


def _shown(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
