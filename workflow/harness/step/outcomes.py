"""Bad outcomes of a step, which become rows of the tables, and how to tell them from bugs in the program."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from harness.errors import first_line, without_secrets

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


def outcome_of(
    work: Callable[[], None], phase: Callable[[], str]
) -> tuple[Literal["ok", "skipped", "diverged", "oom"], str | None]:
    """Do `work`; a bad outcome becomes a status with its reason, and a bug raises.

    Args:
        work: training or measurement, from loading to its end.
        phase: where `work` is, asked when memory has run out.
    """
    try:
        work()
    except CannotRunError as error:
        return "skipped", without_secrets(str(error))
    except DivergedError as error:
        return "diverged", without_secrets(str(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return "oom", out_of_memory_why(error, phase())
    return "ok", None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: torch raises its own exception on a GPU; others are recognised by their message."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _ALLOCATORS_SAY)
    )


def out_of_memory_why(error: BaseException, phase: str) -> str:
    """One line for a record: where memory ran out, and the first line of the allocator's message."""
    return f"in phase {phase}: {first_line(error) if str(error) else 'host memory'}"


def requested_bytes(message: str) -> int | None:
    """Bytes requested from an allocator, read from its error message; None if the message names no number."""
    found = _REQUEST.search(message)
    return None if found is None else round(float(found[1]) * _UNITS[found[2]])
