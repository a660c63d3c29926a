"""Measures one block of one cell in this process. Bad outcomes become replies; bugs raise."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from harness.efficiency.jobs import Job, Reply
from harness.efficiency.record import MemoryBlock, OutOfMemory
from harness.efficiency.timing import time_steps
from harness.measuring.census import state_bytes
from harness.measuring.meters import Meters
from harness.step.cell import CellRun, Phase
from harness.step.outcomes import CannotRunError, is_out_of_memory, out_of_memory_why, requested_bytes
from harness.step.worst_case import run_worst_case

RECIPE_STEPS = 1000
"""Length of the run in the recipe; memory does not depend on it."""


class Attempt:
    """State of a block while it runs: however it ends, its phase can be reported and its model released."""

    def __init__(self) -> None:
        self.phase: Phase = "load"
        self.run: CellRun | None = None


def execute(job: Job, meters: Meters) -> Reply:
    """Measure, and restore the device to its earlier state.

    Raises:
        Exception: a bug in the program; the process must not be used again.
    """
    meters.clean()
    meters.restart()
    attempt = Attempt()
    try:
        reply = (_memory if job.do == "memory" else _timing)(job, meters, attempt)
    except CannotRunError as error:
        reply = Reply(status="skipped", why=str(error))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reply = _out_of_memory(job, attempt.phase, error)
    if meters.foreign_why is not None:
        reply = reply.model_copy(update={"memory": None, "timing": None, "why": f"void: {meters.foreign_why}"})
    attempt.run = None
    return reply.model_copy(update={"clean": meters.clean()})


def _out_of_memory(job: Job, phase: Phase, error: Exception) -> Reply:
    asked = requested_bytes(str(error))
    why = None if asked is not None else "the message names no number"
    return Reply(
        status="oom",
        why=out_of_memory_why(error, phase),
        oom=OutOfMemory(
            block="memory" if job.do == "memory" else "timing",
            phase=phase,
            requested_bytes=asked,
            requested_bytes_why=why,
        ),
    )


class CellPhases:
    """Tells the meters the current phase of a cell, and records the phase and draw of its peak.

    `first_step` is a phase that overlaps the others, from the first forward pass to the second.

    Args:
        meters: told when a phase begins and ends.
        draw: returns the active layers.
    """

    def __init__(self, meters: Meters, draw: Callable[[], tuple[int, ...] | None] = lambda: None) -> None:
        self.peak_bytes: int | None = None
        """Largest allocated peak of all phases except `load`, which is not part of a step."""
        self.peak_phase: str | None = None
        self.peak_draw: tuple[int, ...] | None = None
        self._meters, self._draw = meters, draw
        self._phase: str = "load"
        self._forwards = 0
        meters.begin(self._phase)

    def enter(self, phase: Phase) -> None:
        """Begin another phase."""
        self._end_phase()
        if phase == "forward":
            self._forwards += 1
            if self._forwards == 1:
                self._meters.begin("first_step")
            elif self._forwards == 2:
                self._meters.end("first_step")
        self._phase = phase
        self._meters.begin(phase)

    def close(self) -> None:
        """End the last phase."""
        self._end_phase()
        if self._forwards == 1:
            self._meters.end("first_step")

    def _end_phase(self) -> None:
        allocated = self._meters.end(self._phase).get("allocated")
        if allocated is not None and self._phase != "load" and allocated > (self.peak_bytes or 0):
            self.peak_bytes, self.peak_phase, self.peak_draw = allocated, self._phase, self._draw()


def _memory(job: Job, meters: Meters, attempt: Attempt) -> Reply:
    started = time.perf_counter()
    before = meters.allocated_bytes()
    phases = CellPhases(meters, lambda: _last_draw(attempt.run))

    def enter(phase: Phase) -> None:
        attempt.phase = phase
        phases.enter(phase)
        if phase == "resample" and attempt.run is not None:
            meters.pinned(attempt.run.method.pinned_bytes())

    def on_device(tensor: Tensor) -> bool:
        return tensor.device.type == job.device

    with meters.peak_kept():
        attempt.run = run = CellRun(job.cell, steps=RECIPE_STEPS, device=job.device, enter=enter)
        meters.synchronise()
        loaded = time.perf_counter()
        run.prepare()
        run_worst_case(run, held_bytes=lambda: state_bytes(run.method.optimizer, counts=on_device))
        meters.synchronise()
        phases.close()
    meters.sample_driver()
    meters.pinned(run.method.pinned_bytes())
    memory = meters.record(state_peak_bytes=None)
    reserved = [peak for peak in memory.device_reserved_peak_bytes.values() if peak is not None]
    block = MemoryBlock(
        **dict(memory),
        allocated_peak_bytes=phases.peak_bytes,
        reserved_peak_bytes=max(reserved, default=None),
        peak_phase=phases.peak_phase,
        worst_draw=phases.peak_draw,
        allocated_before_bytes=before,
        device_state_bytes=state_bytes(run.method.optimizer, counts=on_device) if job.device == "cuda" else None,
        load_s=loaded - started,
        wall_s=time.perf_counter() - started,
    )
    return Reply(status="ok", memory=block, **_facts(run))


def _last_draw(run: CellRun | None) -> tuple[int, ...] | None:
    return run.draws.made[-1] if run is not None and run.draws.made else None


def _timing(job: Job, meters: Meters, attempt: Attempt) -> Reply:
    def enter(phase: Phase) -> None:
        # while steps are timed, peaks are neither read nor reset
        attempt.phase = phase

    def take(run: CellRun) -> None:
        attempt.run = run

    block = time_steps(job, meters, enter=enter, take=take)
    assert attempt.run is not None
    return Reply(status="ok", timing=block, **_facts(attempt.run))


def _facts(run: CellRun) -> dict[str, Any]:
    return {
        "parameters": run.facts.total_parameters,
        "trainable_parameters": run.promise.trainable_parameters,
    }
