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
    one printable line below `LONGEST` letters without secrets: long values and lists lose their middle.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_one_sentence(message))


LONGEST = 300
"""Letters that a message for the user stays below."""
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
    # a message begins with the file and ends with the mend
    where, colon, rest = text.partition(": ")
    text = _shortened(where, 150) + colon + re.sub(r"\S{101,}", lambda word: _shortened(word[0], 40), rest)
    text = re.sub(r"(?:[^,;:]{1,40}, ){8,}", _fewer, text) if len(text) >= LONGEST else text
    return _shortened(text, LONGEST - 1)


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
    """First line of an error's message without secrets, to be quoted in our own; its class name if it has none."""
    lines = [line for line in without_secrets(str(error)).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
