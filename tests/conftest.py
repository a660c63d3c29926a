"""What the whole test run says at its end; here, since with several workers only this file is known to the first."""

from __future__ import annotations

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The score of the planted defects, and by which check each was caught."""
    tried = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if "test_defect_is_caught" in report.nodeid and report.when == "call"
    ]
    if tried:
        names = {"defect": "unnamed", "caught_by": "its own test"}
        caught = [names | dict(report.user_properties) for report in tried if report.outcome == "passed"]
        caught.sort(key=lambda properties: str(properties["defect"]))
        terminalreporter.section(f"planted defects: {len(caught)} of {len(tried)} caught")
        for properties in caught:
            terminalreporter.write_line(f"  {properties['defect']:<28} {properties['caught_by'][:140]}")
