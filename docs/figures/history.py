"""Draw the heat map of docs/grass.md from the run at the top of that page: `history.py <out.png>`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import grass

PAGE = Path(__file__).parent.parent / "grass.md"

if __name__ == "__main__":
    first = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert first is not None
    names: dict[str, Any] = {}
    exec(first.group(1), names)
    grass.plot(names["opt"].history, value="importance").savefig(sys.argv[1], dpi=110, metadata={"Software": None})
