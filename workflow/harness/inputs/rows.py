"""Rows read from files: those of LLM-Adapters and of GSM8K."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.inputs.prompts import Row

__all__ = ["Row", "read_rows"]

_CALCULATOR = re.compile(r"<<[^>]*>>")
_FIELDS = ("instruction", "input", "output", "answer")
_SHAPES = f"{', '.join(_FIELDS)} (LLM-Adapters .json) or question, answer (GSM8K .jsonl)"


def read_rows(path: Path) -> list[Row]:
    """Rows of an LLM-Adapters file (`.json`, `.json.gz`) or of a GSM8K file (`.jsonl`), in file order.

    GSM8K: `question` becomes the instruction; the calculator marks `<<...>>` are taken out of the rationale and the
    last line `#### N` becomes "The answer is N.", so that the last number of the output is the answer; `answer` is N
    without thousands commas.

    Raises UserError, naming file and row (counted from 1), for a missing file, text that is not JSON, a missing or
    non-text field and a non-empty `input` (the short prompt template has no place for it).
    """
    text = _text(path)
    try:
        if path.name.endswith(".jsonl"):
            return [_gsm8k(json.loads(line), where=f"{path}, row {n}") for n, line in _lines(text)]
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); expected LLM-Adapters .json or GSM8K .jsonl") from error
    if not isinstance(values, list):
        raise UserError(
            f"{path}: expected a list of rows, found {type(values).__name__}; write the rows as [{{...}}, ...]"
        )
    return [_llm_adapters(value, where=f"{path}, row {n}") for n, value in enumerate(values, start=1)]


def _text(path: Path) -> str:
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the path in the config and the variables in it")
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        kind = "gzipped " if path.suffix == ".gz" else ""
        raise UserError(
            f"{path}: cannot be read as {kind}UTF-8 text ({error}); save it so, or name it as what it is"
        ) from error


def _lines(text: str) -> list[tuple[int, str]]:
    # Not splitlines: a JSON string may hold U+2028, which is no line end in JSON lines.
    return [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]


def _field(value: Any, key: str, *, where: str) -> str:
    if not isinstance(value, dict) or key not in value:
        raise UserError(f"{where}: no field '{key}'; a row has {_SHAPES}")
    if not isinstance(value[key], str):
        raise UserError(f"{where}: field '{key}' is {type(value[key]).__name__}, expected text: put it in quotes")
    return str(value[key])


def _llm_adapters(value: Any, *, where: str) -> Row:
    instruction, extra, output, answer = (_field(value, key, where=where) for key in _FIELDS)
    if extra:
        raise UserError(f"{where}: field 'input' is not empty; move its text into 'instruction'")
    return Row(instruction=instruction, input="", output=output, answer=answer)


def _gsm8k(value: Any, *, where: str) -> Row:
    question, solution = _field(value, "question", where=where), _field(value, "answer", where=where)
    rationale, mark, final = solution.rpartition("####")
    if not mark:
        raise UserError(f"{where}: field 'answer' has no '#### N' at its end; add the final number")
    answer = final.strip().replace(",", "")
    worked = _CALCULATOR.sub("", rationale).strip()
    return Row(instruction=question, input="", output=f"{worked}\nThe answer is {answer}.".lstrip(), answer=answer)
