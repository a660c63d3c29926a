"""The one exception that is meant for the user. Imports nothing of ours: every package of the harness may use it."""

from __future__ import annotations

import importlib.util

_OURS = ("grass", "baselines", "harness")
OWN_FAULT = "this is a fault of the project, not of your input: please report it with the traceback above"
"""Said below the traceback of an exception that is not the user's mistake."""


class UserError(Exception):
    """A mistake of the user's: one line that says what is wrong and how to fix it.

    Any other exception is a bug in this project, and is shown with its traceback.
    """


def missing_package(error: ModuleNotFoundError) -> str | None:
    """The package that is not installed; None if a module of ours or of an installed package is missing: a bug."""
    root = (error.name or "").partition(".")[0]
    known = not root or root in _OURS or importlib.util.find_spec(root) is not None
    return None if known else root


def first_line(error: BaseException) -> str:
    """First line of an error's message, to be quoted in our own messages; the error's class name if it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]
