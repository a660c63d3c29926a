"""A piece of work in a fork of this process, and by how much memory it grew there."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from harness.measuring.freed_memory import give_back_freed_memory
from harness.measuring.host import resident_data

T = TypeVar("T")

EVERY_S = 0.002
"""Between two looks at the fork's memory, beside the time of a look: 10 ms for a GiB. What lives for less is missed."""


def in_a_fork(work: Callable[[], T], *, first: Callable[[], object] = lambda: None) -> tuple[T, int | None]:
    """What `work` returns, and the bytes by which its resident data grew at most; None: that cannot be read.

    This process looks at the fork's pages again and again while it works: the kernel's own high-water mark has the
    libraries in it, which a fork maps anew as it touches them. In the fork every freed block of some size goes back to
    the system at once, so that growth is what was alive together, memory that torch's allocator never sees with it. Not
    after CUDA has been initialised: a fork cannot use it.

    Args:
        work: its growth counts.
        first: done in the fork before it, and does not count: imports, caches.

    Raises:
        Exception: what `work` raises.
        RuntimeError: the fork ended without a result, as when it is killed.
    """
    forking = multiprocessing.get_context("fork")
    here, there = forking.Pipe()
    process = forking.Process(target=_work, args=(first, work, there), daemon=True)
    process.start()
    there.close()
    proc = Path(f"/proc/{process.pid}")
    try:
        raised, result = here.recv()
        before = highest = resident_data(proc) or 0
        if not raised:
            here.send(None)
            while not here.poll(EVERY_S):
                highest = max(highest, resident_data(proc) or 0)
            raised, result = here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process that did it ended with {process.exitcode}") from None
    process.join()
    if raised:
        raise result
    return result, highest - before if before else None


def _work(first: Callable[[], object], work: Callable[[], Any], there: Connection) -> None:
    give_back_freed_memory()
    try:
        first()
        gc.collect()
        give_back_freed_memory()
        there.send((False, None))
        there.recv()
        there.send((False, work()))
    except Exception as error:  # noqa: BLE001 - it is raised again in the parent
        with suppress(Exception):
            there.send((True, pickle.loads(pickle.dumps(error))))
            return
        there.send((True, RuntimeError(f"{type(error).__name__}: {error}")))
