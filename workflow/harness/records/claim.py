"""What lies in a folder of unfinished work belongs to what it was made from, and goes where that is another now."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from harness.errors import UserError
from harness.records.atomic import write_json
from harness.records.code import Roots, code_of
from harness.records.reading import read_json

_MADE_FROM = "made_from.json"


def with_code(made_from: Mapping[str, str], roots: Roots) -> dict[str, str]:
    """What unfinished work is made from, with the code that makes it."""
    return {**made_from, "code": code_of(roots).sha256}


def claim(folder: Path, made_from: Mapping[str, str]) -> str | None:
    """Say what the unfinished work in a folder is made from, and drop what was made from something else.

    Args:
        folder: results/state/<job>.
        made_from: by role, what must be the same for the work to go on: hashes of files and of code, the learning rate.

    Returns:
        A line for the record if something was dropped.
    """
    note, path = None, folder / _MADE_FROM
    if folder.exists() and any(folder.iterdir()):
        before = _read_made_from(path)
        differs = sorted(role for role in before.keys() | made_from.keys() if before.get(role) != made_from.get(role))
        if before and not differs:
            return None
        shutil.rmtree(folder)
        note = f"a resume state was dropped: it was made from another {differs[0] if before else 'model, or unknown'}"
    write_json(path, dict(made_from))
    return note


def _read_made_from(path: Path) -> dict[str, str]:
    """What the work was made from; nothing where that is not known."""
    try:
        found = read_json(path)
    except UserError:
        return {}
    return found if isinstance(found, dict) else {}
