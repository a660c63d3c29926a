from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness.checking.tiny import tiny_inputs
from harness.training.loading import Inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A random Llama of 4 layers and 64 rows, on disk."""
    return tiny_inputs(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _one_thread(tmp_path: Path) -> None:
    import torch

    torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The score of the planted defects, and by which check each was caught."""
    tried = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if "test_defect_is_caught" in report.nodeid and report.when == "call"
    ]
    if tried:
        caught = [dict(report.user_properties) for report in tried if report.outcome == "passed"]
        terminalreporter.section(f"planted defects: {len(caught)} of {len(tried)} caught")
        for properties in caught:
            terminalreporter.write_line(f"  {properties['defect']:<28} {properties['caught_by'][:140]}")
