"""Units for showing bytes to people."""

from __future__ import annotations

import re

from harness.errors import UserError

MIB, GIB = 2**20, 2**30
"""Bytes."""


def gib(nbytes: float, digits: int = 2) -> str:
    """Bytes as a number of GiB, without the unit's name."""
    return f"{nbytes / GIB:,.{digits}f}"


_UNITS = {"GiB": GIB, "MiB": MIB, "GB": 10**9, "MB": 10**6}


def parse_bytes(text: str) -> int:
    """`24GiB`, `24 GB`, `16384MiB` in bytes.

    Raises:
        UserError: the text is not an amount of memory.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(GiB|MiB|GB|MB)\s*", text)
    if match is None or not float(match[1]):
        raise UserError(f"{text!r} is no amount of memory: write a number and one of {', '.join(_UNITS)}, as in 24GiB")
    return round(float(match[1]) * _UNITS[match[2]])
