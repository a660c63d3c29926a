"""The one exception that is meant for the user. Imports nothing of ours: every package of the harness may use it."""

from __future__ import annotations

import importlib.util

_OURS = ("grass", "baselines", "harness")


class UserError(Exception):
    """A mistake of the user's: one line that says what is wrong and how to mend it.

    Any other exception is a fault of this project, and keeps its traceback.
    """


def missing_package(error: ModuleNotFoundError) -> str | None:
    """The package that is not installed here; None where something else is missing, which is a fault of ours."""
    root = (error.name or "").partition(".")[0]
    known = not root or root in _OURS or importlib.util.find_spec(root) is not None
    return None if known else root


def first_line(error: BaseException) -> str:
    """What an error says first, or what it is called where it says nothing: a sentence of ours holds one line of it."""
    return (str(error) or type(error).__name__).splitlines()[0]
