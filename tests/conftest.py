"""What the whole test run says at its end; here, since with several workers only this file is known to the first."""

from __future__ import annotations

from typing import Any


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
