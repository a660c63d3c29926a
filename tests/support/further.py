"""Which cases of a test run with every change, and which with --exhaustive alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def further(of_all: bool) -> Any:
    """Mark of a case that needs --exhaustive unless `of_all`."""
    return () if of_all else pytest.mark.exhaustive


def a_few(cases: Iterable[Any], *, one_in: int) -> list[Any]:
    """Cases for `parametrize`; every `one_in`-th, beginning with the first, runs without --exhaustive."""
    return [case if number % one_in == 0 else _marked(case) for number, case in enumerate(cases)]


def _marked(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    marks = [pytest.mark.exhaustive, *getattr(case, "marks", ())]
    return pytest.param(*getattr(case, "values", values), marks=marks, id=getattr(case, "id", None))
