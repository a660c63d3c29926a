"""What holds for every test, and what the whole run says at its end.

The summary stands here, since with several workers only this file is known to the first.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The score of the planted defects, by which check each was caught, and how many sound scripts were let through."""
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
    """Half of the time of a tiny run goes into three things that only a long one needs, left out in this process.

    One is the search for dead models of earlier runs, which may stay here; another is waiting for the disk; the third
    is the kernel's walk over all pages of this process, which holds what every test before imported.
    """
    from harness.measuring import meters
    from harness.records import atomic
    from harness.training import engagement

    def begin_census() -> None:
        gc.collect()  # only what was made since the last freeze
        gc.freeze()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engagement, "begin_census", begin_census)
        patch.setattr(atomic, "_flush", lambda path: None)
        patch.setattr(meters, "proportional_set", lambda: (None, "not read in tests"))
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
