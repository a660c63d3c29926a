"""What the C library does with memory that is freed: it decides the time of temporaries, and the resident set."""

from __future__ import annotations

import ctypes
import os

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
    """Let the C library keep memory that is freed, from here on; False where it cannot be told to (it is not glibc).

    glibc gives a freed temporary of some MiB back to the system or keeps it, by what else happened to be allocated.
    Where it gives it back, every page of the next one is faulted in anew: the same step of torch's AdamW then takes
    twice as long, or not, from one process to the next.
    """
    # 32 MiB is the most that glibc takes
    return _set(mmap_threshold=32 * 2**20, trim_threshold=2**30)


def give_back_freed_memory() -> bool:
    """The opposite: what is freed, of 64 KiB or more, goes back to the system at once, and so does what was kept."""
    if not _set(mmap_threshold=2**16, trim_threshold=2**16):
        return False
    ctypes.CDLL(None).malloc_trim(0)
    return True


def _set(*, mmap_threshold: int, trim_threshold: int) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, mmap_threshold)) and bool(mallopt(_M_TRIM_THRESHOLD, trim_threshold))
