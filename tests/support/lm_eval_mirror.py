"""A mirror folder with small data sets of two tasks of lm-eval: one multiple choice, one whose answer is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

ARC = "allenai/ai2_arc"
GSM8K = "openai/gsm8k"
ITEMS = 12
_CARD = """\
---
configs:
{configs}---
"""
_CONFIG = """\
- config_name: {name}
  data_files:
  - {{split: train, path: {name}/train-*}}
  - {{split: validation, path: {name}/validation-*}}
  - {{split: test, path: {name}/test-*}}
"""


def mirror(folder: Path) -> Path:
    """Write both data sets; that of GSM8K without its card, as copies often are."""
    for config in ("ARC-Easy", "ARC-Challenge"):
        for number, split in enumerate(("train", "validation", "test")):
            _write(folder / ARC / config / f"{split}-00000-of-00001.parquet", [_arc(i, number) for i in range(ITEMS)])
    card = _CARD.format(configs="".join(_CONFIG.format(name=name) for name in ("ARC-Challenge", "ARC-Easy")))
    (folder / ARC / "README.md").write_text(card, encoding="utf-8")
    for number, split in enumerate(("train", "test")):
        _write(folder / GSM8K / "main" / f"{split}-00000-of-00001.parquet", [_gsm8k(i, number) for i in range(ITEMS)])
    return folder


def _arc(item: int, split: int) -> dict[str, Any]:
    texts = [f"{item + n + split} apples" for n in range(4)]
    choices = {"text": texts, "label": ["A", "B", "C", "D"]}
    return {"id": f"{split}-{item}", "question": f"How many apples has Ann {item} {split}?", "choices": choices,
            "answerKey": "ABCD"[item % 4]}  # fmt: skip


def _gsm8k(item: int, split: int) -> dict[str, Any]:
    return {"question": f"Ann has {item} pens and buys {split}. How many now?",
            "answer": f"{item} + {split} = {item + split}\n#### {item + split}"}  # fmt: skip


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
