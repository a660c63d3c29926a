"""Records of single steps for the tests of GRASS's history and of its heat map."""

from __future__ import annotations

from typing import Any

from grass.trace import Record

LAYERS = 4


def record(step: int = 0, **fields_of: Any) -> Record:
    """A step in which layers 1 and 3 train."""
    chosen: dict[str, Any] = {
        "step": step,
        "active": (1, 3),
        "norm": (None,) * LAYERS,
        "importance": (0.1, 0.2, 0.3, 0.4),
        "age": (0, 1, 2, 3),
        "probability": (0.1, 0.2, 0.3, 0.4),
        "effective_layers": 3.6,
        "mode": "resident",
        "moved_bytes": 0,
        "exposed_copy_s": None,
        **fields_of,
    }
    return Record(**chosen)
