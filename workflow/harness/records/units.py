"""Units for showing bytes to people."""

from __future__ import annotations

MIB, GIB = 2**20, 2**30
"""Bytes."""


def gib(nbytes: float, digits: int = 2) -> str:
    """Bytes as a number of GiB, without the unit's name."""
    return f"{nbytes / GIB:,.{digits}f}"
