"""A piece of work in a fork of this process, and by how much memory it grew there."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from harness.measuring.freed_memory import give_back_freed_memory
from harness.measuring.host import HostMeter

T = TypeVar("T")


def in_a_fork(work: Callable[[], T], *, first: Callable[[], object] = lambda: None) -> tuple[T, int | None]:
    """What `work` returns, and the bytes by which its resident set grew at most; None: that cannot be read.

    It is the kernel's high-water mark. In the fork every freed block of some size goes back to the system at once, so
    that growth is what was alive together, memory that torch's allocator never sees with it. Not after CUDA has been
    initialised: a fork cannot use it.

    Args:
        work: its growth counts.
        first: done in the fork before it, and does not count: imports, caches, and libraries, whose pages a fork maps
            anew as it touches them.

    Raises:
        Exception: what `work` raises.
        RuntimeError: the fork ended without a result, as when it is killed.
    """
    forking = multiprocessing.get_context("fork")
    here, there = forking.Pipe(duplex=False)
    process = forking.Process(target=_work, args=(first, work, there), daemon=True)
    process.start()
    there.close()
    try:
        raised, result, grown = here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process that did it ended with {process.exitcode}") from None
    process.join()
    if raised:
        raise result
    return result, grown


def _work(first: Callable[[], object], work: Callable[[], Any], there: Connection) -> None:
    give_back_freed_memory()
    try:
        first()
        gc.collect()
        give_back_freed_memory()
        meter = HostMeter()
        before = meter.peak_bytes()
        result = work()
        after = meter.peak_bytes()
        there.send((False, result, None if before is None or after is None else after - before))
    except Exception as error:  # noqa: BLE001 - it is raised again in the parent
        with suppress(Exception):
            there.send((True, pickle.loads(pickle.dumps(error)), None))
            return
        there.send((True, RuntimeError(f"{type(error).__name__}: {error}"), None))
