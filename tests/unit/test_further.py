"""Further cases of tests: left out where another case of the same test runs, and only there."""

from __future__ import annotations

import pytest
from further import a_few, further
from house import ROOT

pytest_plugins = ["pytester"]
TESTS = """
import pytest

further = pytest.mark.exhaustive

@pytest.mark.parametrize("case", ["first", pytest.param("second", marks=further)])
def test_some(case):
    pass

@pytest.mark.parametrize("case", [pytest.param("alone", marks=further)])
def test_never_left_out(case):
    pass
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    pytester.makeini("[pytest]\nmarkers = exhaustive: x\n")
    pytester.makepyfile(test_it=TESTS)
    return pytester


def ran(project: pytest.Pytester, *words: str) -> set[str]:
    lines = project.runpytest_inprocess("-v", "-p", "no:xdist", *words).outlines
    return {line.partition("::")[2].partition(" ")[0] for line in lines if " PASSED" in line}


def test_some_case_of_every_test_runs_and_what_is_left_is_said(project: pytest.Pytester) -> None:
    assert ran(project) == {"test_some[first]", "test_never_left_out[alone]"}
    project.runpytest_inprocess().stdout.fnmatch_lines(["*further cases left to `make exhaustive`: 1*"])


def test_all_run_when_asked_and_a_case_when_named(project: pytest.Pytester) -> None:
    assert len(ran(project, "--exhaustive")) == 3
    assert ran(project, "test_it.py::test_some[second]") == {"test_some[second]"}


def test_a_few_cases_keep_their_order_values_and_marks() -> None:
    marked = pytest.param("d", id="name", marks=pytest.mark.gpu)
    few = a_few(["a", "b", ("c", 1), marked], one_in=3)
    assert (few[0], few[3]) == ("a", marked)
    assert [case.values for case in few[1:3]] == [("b",), ("c", 1)]
    assert [mark.name for case in few[1:3] for mark in case.marks] == ["exhaustive"] * 2
    second = a_few(["a", marked], one_in=2)[1]
    assert ({mark.name for mark in second.marks}, second.id) == ({"exhaustive", "gpu"}, "name")


def test_what_is_asked_of_all_has_no_mark() -> None:
    assert further(of_all=True) == ()
    assert further(of_all=False).name == "exhaustive"
