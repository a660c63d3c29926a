"""Training scripts under an audit: sound ones, which it must never call BROKEN, and broken ones, which it must catch.

Every script trains the tiny Llama in its own way and returns the audit.
"""

from audited import faults, flags, in_backward, rates, several, stepping, trainers, writing
from audited.common import BROKEN, DOUBTFUL, SOUND

__all__ = [
    "BROKEN",
    "DOUBTFUL",
    "SOUND",
    "faults",
    "flags",
    "in_backward",
    "rates",
    "several",
    "stepping",
    "trainers",
    "writing",
]
