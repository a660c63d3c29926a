"""What holds for every test, and what the whole run says at its end.

The summary stands here, since with several workers only this file is known to the first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

LEFT = pytest.StashKey[int]()
"""How many further cases were left out."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the flag of `make exhaustive`."""
    parser.addoption("--exhaustive", action="store_true", help="with the further cases of tests (marker: exhaustive)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the further cases of a test to `make exhaustive`; some case of every test stays, or the one that was named.

    Every test runs with every change, which has to take minutes; not every one with all options, families and sizes.
    """
    if config.getoption("exhaustive"):
        return
    stay = {_test(item) for item in items if not _further(item)}
    left = [item for item in items if _further(item) and _test(item) in stay]
    config.hook.pytest_deselected(items=left)
    gone = set(left)
    items[:] = [item for item in items if item not in gone]
    config.stash[LEFT] = len(left)
    if hasattr(config, "workeroutput"):
        config.workeroutput["left"] = len(left)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over from a worker what it left out: the first process collects nothing itself."""
    node.config.stash[LEFT] = getattr(node, "workeroutput", {}).get("left", 0)


def _further(item: pytest.Item) -> bool:
    return item.get_closest_marker("exhaustive") is not None


def _test(item: pytest.Item) -> tuple[Any, Any]:
    return item.path, getattr(item, "originalname", item.name)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """What was left out; by which check each planted defect was caught; how many sound scripts were let through."""
    if left := config.stash.get(LEFT, 0):
        terminalreporter.section(f"further cases left to `make exhaustive`: {left}")
    calls = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if report.when == "call"
    ]
    sound = [report for report in calls if "test_sound_script_is_not_called_broken" in report.nodeid]
    if sound:
        right = sum(report.outcome == "passed" for report in sound)
        terminalreporter.section(f"sound scripts: {right} of {len(sound)} not called BROKEN")
    tried = [report for report in calls if "test_defect_is_caught" in report.nodeid]
    if tried:
        names = {"defect": "unnamed", "caught_by": "its own test"}
        caught = [names | dict(report.user_properties) for report in tried if report.outcome == "passed"]
        caught.sort(key=lambda properties: str(properties["defect"]))
        terminalreporter.section(f"planted defects: {len(caught)} of {len(tried)} caught")
        for properties in caught:
            terminalreporter.write_line(f"  {properties['defect']:<28} {properties['caught_by'][:140]}")


@pytest.fixture(scope="session", autouse=True)
def quick_small_runs() -> Iterator[None]:
    """Of every test in this process; what starts processes of its own has the whole of it."""
    from quick_runs import quicken  # here, since the first of several processes needs no torch

    with pytest.MonkeyPatch.context() as patch:
        quicken(patch)
        yield


@pytest.fixture(autouse=True)
def environment_of_its_own() -> Iterator[None]:
    """What a stage sets for its own process, such as offline flags, must not reach the next test."""
    before = dict(os.environ)
    yield
    # pytest keeps its own variable, which names the running test
    for name in set(os.environ) - set(before) - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if name != "PYTEST_CURRENT_TEST"})
