"""Small runs without what only a long one needs, which is half of their time."""

from __future__ import annotations

import gc

import pytest
from harness.measuring import meters
from harness.records import atomic

UNFREEZE = gc.unfreeze
"""As it is outside tests."""


def quicken(patch: pytest.MonkeyPatch) -> None:
    """Leave out the search for garbage among all imports, waits for the disk, and the walk over the process's pages.

    Each run, forecast and measurement collects garbage, and gives what it froze for that back to the collector, which
    then walks through all that was ever imported. Here that stays frozen, with the dead models of earlier small runs.
    """
    gc.collect()
    gc.freeze()
    patch.setattr(gc, "unfreeze", lambda: None)
    patch.setattr(atomic, "_flush", lambda path: None)
    patch.setattr(meters, "proportional_set", lambda: (None, "not read in tests"))
