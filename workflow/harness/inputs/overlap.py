"""When two questions count as the same: for test items that occur in training rows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from harness.inputs.prompts import Row, user_text

_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def normalised(text: str) -> str:
    """Lower case, punctuation replaced by spaces, white space collapsed; letters, digits and decimal points stay.

    Punctuation becomes a space, so that "Ann's" and the tokenised "Ann 's" of the MAWPS files are equal.
    """
    return " ".join(re.sub(r"\.(?!\d)|[^\w\s.]|_", " ", text.lower()).split())


def masked(row: Row) -> str:
    """A row's instruction and input, every number the same: one story with two sets of numbers is one.

    Letters and numbers alone count: tokenised text has "did n't" where the same story elsewhere has "didn't".
    """
    return _NUMBER.sub("0", normalised(user_text(row))).replace(" ", "")


def without(rows: Sequence[Row], others: Iterable[Row]) -> list[Row]:
    """The rows whose masked text is that of none of the others."""
    taken = {masked(row) for row in others}
    return [row for row in rows if masked(row) not in taken]
