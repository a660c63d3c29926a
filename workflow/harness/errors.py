"""The one exception that is meant for the user. Imports nothing of ours: every package of the harness may use it."""

from __future__ import annotations

import importlib.util
import os
import re

_OURS = ("grass", "baselines", "harness")
OWN_FAULT = "this is a fault of the project, not of your input: please report it with the traceback above"
"""Said below the traceback of an exception that is not the user's mistake."""


class UserError(Exception):
    """A mistake of the user's: one line that says what is wrong and how to fix it.

    Any other exception is a bug in this project, and is shown with its traceback. Whatever the message quotes, it stays
    one printable line below `LONGEST` letters without secrets: long values and lists lose their middle. Paths keep all
    of theirs, since they are there to be copied, and do not count.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_one_sentence(message))


LONGEST = 300
"""Letters that a message for the user stays below, paths left out."""
LONGEST_PATH = 250
LONGEST_QUOTE = 200
_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN")
_SECRET = re.compile(r"\bhf_(?=[A-Za-z0-9]*[A-Z0-9])[A-Za-z0-9]{8,}|(?<=://)[^/@\s]+(?=@)")
_SHORTEST_SECRET = 8


def without_secrets(text: str) -> str:
    """The text without access tokens and the user part of URLs, for logs, records and messages."""
    for name in _TOKENS:
        value = os.environ.get(name, "").strip()
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "***")
    return _SECRET.sub("***", text)


def _one_sentence(text: str) -> str:
    text = " ".join(without_secrets(text).splitlines())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    if len(text) < LONGEST:
        return text
    text = re.sub(r"\S{101,}", lambda word: word[0] if _is_path(word[0]) else _shortened(word[0], 40), text)
    if letters(text) >= LONGEST:
        text = re.sub(r"(?:[^,;:]{1,40}, ){8,}", _fewer, text)
    # a message begins with the file and ends with the mend
    return text if letters(text) < LONGEST else _shortened(text, LONGEST - 1 + len(text) - letters(text))


def letters(text: str) -> int:
    """Letters of a message, paths left out."""
    return len(text) - sum(len(word) for word in text.split() if _is_path(word))


def _is_path(word: str) -> bool:
    return "/" in word and len(word) <= LONGEST_PATH


def _shortened(text: str, longest: int) -> str:
    """The text, or its beginning and its end where it is too long."""
    end = longest * 2 // 5
    return text if len(text) <= longest else f"{text[: longest - end - 5]} ... {text[-end:]}"


def _fewer(listed: re.Match[str]) -> str:
    items = listed[0].split(", ")[:-1]
    return ", ".join([*items[:4], f"... {len(items) - 6} more ...", *items[-2:]]) + ", "


def missing_package(error: ModuleNotFoundError) -> str | None:
    """The package that is not installed; None if a module of ours or of an installed package is missing: a bug."""
    root = (error.name or "").partition(".")[0]
    known = not root or root in _OURS or importlib.util.find_spec(root) is not None
    return None if known else root


def first_line(error: BaseException) -> str:
    """First line of an error's message without secrets, to be quoted in our own; its class name if it has none.

    Of a long line, its first sentence.
    """
    lines = [line for line in without_secrets(str(error)).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return lines[0] if len(lines[0]) <= LONGEST_QUOTE else re.split(r"(?<=\w)\. ", lines[0], maxsplit=1)[0]
