"""Messages to and from a worker process: jobs and replies, one JSON object a line."""

from __future__ import annotations

from typing import Literal

from harness.efficiency.record import ForecastRecord, MemoryBlock, Named, OutOfMemory, TimingBlock
from harness.records.device import DeviceKind, DeviceRecord, StrictRecord
from harness.step.spec import Cell


class Job(StrictRecord):
    """One block of one cell."""

    do: Literal["memory", "timing", "forecast"]
    named: Named
    cell: Cell
    device: DeviceKind
    warmup_steps: int = 0
    timed_steps: int = 0
    repeat: int = 0
    repeats: int = 1


class Hello(StrictRecord):
    """What a worker says first."""

    device: DeviceRecord | None


class Reply(StrictRecord):
    """What came of a job."""

    status: Literal["ok", "oom", "skipped", "error"]
    why: str | None = None
    memory: MemoryBlock | None = None
    timing: TimingBlock | None = None
    forecast: ForecastRecord | None = None
    oom: OutOfMemory | None = None
    parameters: int | None = None
    trainable_parameters: int | None = None
    clean: bool = True
    """Whether the worker may take another job."""
