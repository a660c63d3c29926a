"""One block of one cell, measured in this process. Bad outcomes are answers; a bad program raises."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from typing import Any

import torch

from harness.efficiency.instruments import Instruments
from harness.efficiency.jobs import Job, Reply
from harness.efficiency.phases import PhasePeaks
from harness.efficiency.record import MemoryBlock, OutOfMemory
from harness.efficiency.timing import time_steps
from harness.step.run import CannotRunError, CellRun, Phase
from harness.step.worst_case import run_worst_draws

RECIPE_STEPS = 1000
"""Length of the run that the recipe speaks of; no byte hangs on it."""

_REQUEST = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMGT]iB)")
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def execute(job: Job, instruments: Instruments) -> Reply:
    """Measure, and leave the device as it was.

    Raises:
        Exception: whatever is wrong with the program; the process is to be given up then.
    """
    instruments.begin()
    taken: list[CellRun] = []
    phases = PhasePeaks(instruments.allocator, lambda: taken[0].draws.taken[-1] if _has_drawn(taken) else None)
    try:
        reply = (_memory if job.do == "memory" else _timing)(job, instruments, phases, taken)
    except CannotRunError as error:
        reply = Reply(status="skipped", why=str(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reply = _out_of_memory(job, phases.phase, error)
    if instruments.foreign_why is not None:
        reply = reply.model_copy(update={"memory": None, "timing": None, "why": f"void: {instruments.foreign_why}"})
    taken.clear()
    return reply.model_copy(update={"clean": instruments.clean()})


def is_out_of_memory(error: Exception) -> bool:
    """The CPU's allocator and pinned memory have no exception of their own, only words."""
    words = ("can't allocate memory", "CUDA error: out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def requested_bytes(message: str) -> int | None:
    """Bytes that an allocator was asked for, out of its message."""
    found = _REQUEST.search(message)
    return None if found is None else round(float(found[1]) * _UNITS[found[2]])


def _out_of_memory(job: Job, phase: str, error: Exception) -> Reply:
    message = (str(error) or "host memory").splitlines()[0]
    asked = requested_bytes(str(error))
    why = None if asked is not None else "the message names no number"
    return Reply(
        status="oom",
        why=f"in phase {phase}: {message}",
        oom=OutOfMemory(
            block="memory" if job.do == "memory" else "timing",
            phase=phase,
            requested_bytes=asked,
            requested_bytes_why=why,
        ),
    )


def _has_drawn(taken: list[CellRun]) -> bool:
    return bool(taken) and bool(taken[0].draws.taken)


def _memory(job: Job, instruments: Instruments, phases: PhasePeaks, taken: list[CellRun]) -> Reply:
    started = time.perf_counter()
    before = instruments.allocated_bytes()

    def enter(phase: Phase) -> None:
        phases.enter(phase)
        if phase == "resample" and taken:
            instruments.look_at_host(taken[0].method.pinned_bytes())

    with phases.unnoticed():
        taken.append(CellRun(job.cell, steps=RECIPE_STEPS, device=job.device, enter=enter))
        run = taken[0]
        instruments.synchronise()
        loaded = time.perf_counter()
        run.prepare()
        run_worst_draws(run, lambda: state_bytes(run.method.optimizer, job.device))
        instruments.synchronise()
        phases.close()
    instruments.look()
    instruments.look_at_host(run.method.pinned_bytes())
    on_device = phases.peak_bytes is not None
    block = MemoryBlock(
        allocated_peak_bytes=phases.peak_bytes,
        reserved_peak_bytes=max(phases.reserved.values(), default=None),
        peak_phase=phases.peak_phase,
        worst_draw=phases.peak_draw,
        allocated_by_phase_bytes=phases.allocated if on_device else None,
        reserved_by_phase_bytes=phases.reserved if on_device else None,
        allocated_before_bytes=before,
        device_state_bytes=state_bytes(run.method.optimizer, job.device) if on_device else None,
        alloc_retries=instruments.retries(),
        device_why=instruments.allocator.why,
        **instruments.nvml_peaks(),
        **instruments.host_peaks(),
        load_s=loaded - started,
        wall_s=time.perf_counter() - started,
    )
    return Reply(status="ok", memory=block, **_facts(run))


def _timing(job: Job, instruments: Instruments, phases: PhasePeaks, taken: list[CellRun]) -> Reply:
    block = time_steps(job, instruments, phases, taken)
    return Reply(status="ok", timing=block, **_facts(taken[0]))


def _facts(run: CellRun) -> dict[str, Any]:
    return {
        "parameters": run.facts.total_parameters,
        "trainable_parameters": run.promise.trainable_parameters,
    }


def state_bytes(optimizer: torch.optim.Optimizer | None, device: str) -> int:
    """Bytes of an optimizer's states that lie on `device`, each storage once."""
    values = [] if optimizer is None else [v for state in optimizer.state.values() for v in state.values()]
    held: dict[int, int] = {}
    for value in values:
        if isinstance(value, torch.Tensor) and value.device.type == device:
            with suppress(NotImplementedError):  # a tensor without a storage holds nothing
                held[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    return sum(held.values())
