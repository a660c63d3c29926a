"""docs/audit.md is true: its examples run in order and print the reports that stand below them."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

from house import ROOT

PAGE = ROOT / "docs" / "audit.md"


def test_every_report_of_the_page_is_what_its_example_prints() -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 7
    for number, (example, report) in enumerate(blocks):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(example, f"docs/audit.md, example {number}", "exec"), names)
        assert printed.getvalue() == report
