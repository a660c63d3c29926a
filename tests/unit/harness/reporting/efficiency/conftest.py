"""What the tests of tables and figures of memory and speed share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from harness.efficiency.store import Store
from harness.reporting.style import styled


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty results folder."""
    return Store(tmp_path)


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    with styled():
        yield
    plt.close("all")
