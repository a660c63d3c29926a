"""What tests of reports share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from harness.reporting.style import Drawing
from matplotlib import pyplot as plt

EMPTY = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"></svg>\n'


@pytest.fixture(scope="module")
def empty_figures() -> Iterator[None]:
    """Figures are drawn and not written, which takes four fifths of their time: `test_figures` looks at the files."""

    def save(drawing: Drawing, folder: Path) -> None:
        for suffix in ("svg", "png"):
            (folder / f"{drawing.name}.{suffix}").write_text(EMPTY, encoding="utf-8")
        plt.close(drawing.figure)

    with patch("harness.reporting.figures.save", save):
        yield
