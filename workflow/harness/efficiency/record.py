"""Strict records of a cell: one of its measurements, one of its forecast.

Keys carry their units; bytes are integers. Unknown values are null, with the reason under the same key + `_why`, or
under the block's `_why` where one reason holds for several keys.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field

from harness.records.device import DeviceRecord, StrictRecord
from harness.records.measured import GpuState, Memory
from harness.records.record import Provenance
from harness.step.spec import Numerics, Settings, Shape

Block = Literal["memory", "timing"]
Status = Literal["ok", "oom", "skipped", "error"]
"""`ok`, `oom` and `skipped` are outcomes; `error` means a bug, and the next session measures the cell again."""


NOT_YET = "not measured yet"

MFU_FORMULA = (
    "FLOP of a mean step / (seconds of a mean step x the card's dense bf16 peak): 2 N FLOP a token for each product "
    "with N weights, causal attention by half; forward, the gradients of the inputs of visited layers and of the "
    "weights that train; recomputation left out (harness.step.flops)"
)


class Named(StrictRecord):
    """A cell by its labels."""

    model: str
    settings: str
    shape: str
    method: str
    variant: str = Field(default="", description="options that differ from the method's entry, as `key=value`")

    @property
    def label(self) -> str:
        """The method with its variant."""
        return f"{self.method}+{self.variant}" if self.variant else self.method

    @property
    def name(self) -> str:
        """File name of its records."""
        return f"{self.model}--{self.settings}--{self.shape}--{self.label.replace('=', '-')}"


class MemoryBlock(Memory):
    """Peaks of steps under the worst draw: the figures of every run, and those that only a cell has.

    Phases: load, probe, resample, forward, backward, update; first_step overlaps the others.
    """

    model_config = ConfigDict(strict=True)

    allocated_peak_bytes: int | None = Field(description="of all phases but `load`: what methods are compared by")
    reserved_peak_bytes: int | None = Field(description="what the process held of the pool; depends on its history")
    peak_phase: str | None
    worst_draw: tuple[int, ...] | None = Field(description="active layers at the peak; null for methods that draw none")
    allocated_before_bytes: int | None = Field(description="alive as the cell began; within all figures above")
    device_state_bytes: int | None = Field(description="optimizer states on the device between two steps")
    load_s: float
    wall_s: float


class TimingBlock(StrictRecord):
    """One repeat: timed steps under random draws, in whole periods."""

    repeat: int
    clock: Literal["cuda events", "perf_counter"]
    warmup_steps: int
    timed_steps: int
    period_steps: int = Field(description="steps between two draws here; a short period lets a repeat see more draws")
    own_period_steps: int | None = Field(
        description="steps between two draws in the method's entry; null: it draws none"
    )
    step_s: tuple[float, ...]
    step_median_s: float
    step_p95_s: float
    window_s: float
    tokens: int = Field(description="of the timed steps; none is padding")
    window_tokens_per_s: float = Field(description="of the timed steps as they were, with a draw every `period_steps`")
    tokens_per_s: float = Field(
        description="with a draw every `own_period_steps`: mean first step, mean last step, and the mean of those "
        "between for the rest; the figure of the tables"
    )
    mfu_share: float | None = Field(description="model FLOP utilisation by `mfu_formula`")
    mfu_formula: str = MFU_FORMULA
    mfu_why: str | None = None
    draws: tuple[tuple[int, ...], ...] = Field(description="active layers of each timed period; empty: it draws none")
    mean_reach: float = Field(description="share of the decoder layers that backward visited, watched untimed")
    moved_bytes_per_step: float | None
    exposed_copy_s_per_step: float | None = Field(description="that computing waited for copies, as the method tells")
    copy_why: str | None = None
    offload_mode: str | None = Field(default=None, description="how the method kept its states in the last step")
    probe_batches: int
    probe_s: float | None
    probe_s_why: str | None = None
    probe_energy_j: float | None = Field(
        default=None, description="of `probe_s`, by the driver's counter; null in records older than this"
    )
    probe_energy_why: str | None = None
    window_energy_j: float | None = Field(
        default=None, description="of the timed steps, by the driver's counter of the whole card, idle power included"
    )
    energy_j_per_1000_tokens: float | None = Field(
        default=None, description="of the timed steps as they were, with a draw every `period_steps`"
    )
    energy_why: str | None = Field(default=None, description="why an energy of the timed steps is null")
    card_after: GpuState | None
    card_after_why: str | None = None
    started_utc: str
    wall_s: float


class OutOfMemory(StrictRecord):
    """Where memory ran out."""

    block: Block
    phase: str
    requested_bytes: int | None = Field(description="rounded as the message rounds it")
    requested_bytes_why: str | None = None


class Predicted(StrictRecord):
    """A forecast beside the measured peak."""

    allocated_peak_bytes: int
    source: Literal["fake_tensor"] = "fake_tensor"
    relative_error: float | None = Field(description="(forecast - measured) / measured")
    relative_error_why: str | None = None


class CellRecord(StrictRecord):
    """One cell on one device; rewritten whenever a block of it is measured."""

    cell: Named
    status: Status
    status_why: str | None = None
    module: str
    options: dict[str, Any]
    settings: Settings
    shape: Shape
    numerics: Numerics
    seed: int
    parameters: int | None
    trainable_parameters: int | None = Field(description="in one step")
    facts_why: str | None = None
    device: DeviceRecord
    memory: MemoryBlock | None = None
    memory_why: str | None = NOT_YET
    timing: tuple[TimingBlock, ...] = ()
    timing_why: str | None = NOT_YET
    oom: OutOfMemory | None = None
    predicted: Predicted | None = None
    predicted_why: str | None = "no forecast was made"
    cell_sha256: str | None = Field(default=None, description="of the cell alone; null in records older than this")
    asked_sha256: str = Field(description="of the cell, its device, warm-up, steps and repeats")
    code_sha256: str = Field(description="of the code that decides what is measured; see harness.records.code")
    provenance: Provenance


class ForecastRecord(StrictRecord):
    """Forecast of a cell by `harness.forecasting`; device bytes are those of live storages."""

    cell: Named
    status: Literal["ok", "skipped", "impossible"]
    status_why: str | None = None
    peak_bytes: int | None = None
    peak_phase: str | None = None
    by_phase_bytes: dict[str, int] | None = None
    by_kind_bytes: dict[str, int] | None = Field(default=None, description="what was alive at the peak")
    worst_draw: tuple[int, ...] | None = None
    device_state_bytes: int | None = Field(default=None, description="between two steps")
    host_bytes: int | None = Field(default=None, description="optimizer states on the host between two steps")
    bound_tokens_per_s: float | None = Field(
        default=None,
        description="arithmetic's bound, all methods equally efficient (harness.step.flops): not a time",
    )
    assumed: tuple[str, ...] = ()
    wall_s: float
    packages: dict[str, str]
    asked_sha256: str
    code_sha256: str
    sources: dict[str, str] = Field(
        default_factory=dict, description="first 12 digits of the hash of each file of that code, by module"
    )
    started_utc: str | None = Field(default=None, description="null in records older than this")
