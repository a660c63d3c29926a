"""A suite is worth what it catches: every broken method is caught, and the summary of the test run says by what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from defects import DEFECTS, Defect
from definition import draws_ignore_probability, draws_not_uniform, grass_differs, lisa_differs
from harness.checking.contract import CHECKS, Case, promises_hold
from harness.step import attach
from harness.training.loading import Inputs

import grass
from baselines import find_method

Check = Callable[[Case], str | None]
DEFINITION: dict[str, Check] = {"grass": grass_differs, "lisa": lisa_differs}
DRAWS: dict[str, Check] = {"grass": draws_ignore_probability, "lisa": draws_not_uniform}
"""Two hundred steps each, and so the last ones asked."""


def checks_of(module: str) -> list[Check]:
    """All of them, what needs the shortest runs first."""
    definition, draws = ([checks[module]] if module in checks else [] for checks in (DEFINITION, DRAWS))
    return [promises_hold, *definition, *(check for check in reversed(CHECKS) if check is not promises_hold), *draws]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda d: d.broken.__name__)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_defect_is_caught(
    defect: Defect,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    if defect.method is None:
        monkeypatch.setattr(grass, "Grass", defect.broken)
    else:
        monkeypatch.setattr(attach, "find_method", lambda name: defect.method or find_method(name))
    case = Case(defect.recipe_module, defect.options, inputs, tmp_path)
    for check in checks_of(defect.recipe_module):
        try:
            detail = check(case)
        except Exception as error:  # noqa: BLE001  a crash is a catch too, but it must be named
            detail = f"{type(error).__name__}: {error}"
        if detail is not None:
            record_property("defect", defect.broken.__name__)
            record_property("caught_by", f"{check.__name__}: {detail}")
            return
    pytest.fail(f"{defect.broken.__name__} passes every check")
