"""How a step may end badly: outcomes that are rows of the tables, told apart from faults of the program."""

from __future__ import annotations

import re

_ALLOCATORS_SAY = (
    "can't allocate memory",  # the CPU's
    "CUDA error: out of memory",  # pinned memory, and kernels that find no room for their launch
    "CUBLAS_STATUS_ALLOC_FAILED",
)
_REQUEST = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMGT]iB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


class CannotRunError(Exception):
    """The method cannot run this recipe on this model, or on this machine; the message is the reason."""


class DivergedError(Exception):
    """The loss or the gradient norm is not finite any more."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused: torch's on a GPU has an exception of its own, all others have only words."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATORS_SAY)
    )


def out_of_memory_why(error: BaseException, phase: str) -> str:
    """One line for a record: where memory ran out, and the first line of what the allocator said."""
    return f"in phase {phase}: {(str(error) or 'host memory').splitlines()[0]}"


def requested_bytes(message: str) -> int | None:
    """Bytes that an allocator was asked for, out of its message; None where the message names no number."""
    found = _REQUEST.search(message)
    return None if found is None else round(float(found[1]) * _UNITS[found[2]])
