"""A piece of work in a fork of this process, and by how much memory it grew there."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from harness.measuring.freed_memory import give_back_freed_memory
from harness.measuring.host import HostMeter

T = TypeVar("T")


def in_a_fork(work: Callable[[], T]) -> tuple[T, int | None]:
    """What `work` returns, and the bytes by which the process's resident memory grew at most; None: it cannot be read.

    In the fork every freed block of some size goes back to the system at once, so that growth is what was alive
    together. Everything counts: kernels' temporaries, memory that torch's allocator never sees. Not after CUDA has been
    initialised: a fork cannot use it.

    Raises:
        Exception: what `work` raises.
        RuntimeError: the fork ended without a result, as when it is killed.
    """
    forking = multiprocessing.get_context("fork")
    here, there = forking.Pipe(duplex=False)

    def run() -> None:
        give_back_freed_memory()
        meter = HostMeter()
        before = meter.peak_bytes()
        try:
            result: Any = work()
            after = meter.peak_bytes()
            there.send(("ok", result, None if before is None or after is None else after - before))
        except Exception as error:  # noqa: BLE001 - it is raised again in the parent
            try:
                there.send(("raised", pickle.loads(pickle.dumps(error)), None))
            except Exception:  # noqa: BLE001 - an error that cannot travel
                there.send(("raised", RuntimeError(f"{type(error).__name__}: {error}"), None))

    process = forking.Process(target=run, daemon=True)
    process.start()
    there.close()
    try:
        how, result, grown = here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"the process that did it ended with {process.exitcode}") from None
    process.join()
    if how == "raised":
        raise result
    return result, grown
