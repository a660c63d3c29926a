"""What is measured of a run, as its record has it: memory, times, energy, the card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

from pydantic import Field

from harness.records.record import Record

EVALUATION: Final = "eval"
"""The phase of a run that is not part of training: its memory does not count in a run's peaks."""


def largest(by_phase: Mapping[str, int | None], *, without: str = "") -> int | None:
    """The highest peak over all phases except `without`; None where no peak is known."""
    known = [peak for phase, peak in by_phase.items() if peak is not None and phase != without]
    return max(known, default=None)


class Memory(Record):
    """Peaks by phase, in bytes. Phases: load, prepare (the probe), first_step, steady, eval, save.

    On a GPU the allocator's figures also have the parts of a step: forward, backward, update and resample. Resample is
    the update of a period's last step, if the method promises a period: the new draw happens inside that update and
    cannot be measured apart from it. A part's peak is taken over `watched_steps` steps only, a step's over all steps.
    """

    host_peak_bytes: dict[str, int | None] = Field(description="resident set, the kernel's high-water mark")
    host_peak_bytes_why: str | None = None
    host_pss_bytes: dict[str, int | None] = Field(
        default_factory=dict, description="proportional set as each phase first ended, and at the run's end: no peak"
    )
    host_pss_why: str | None = None
    cgroup_peak_bytes: int | None = Field(
        default=None, description="of the whole control group, page cache and neighbours included"
    )
    cgroup_peak_why: str | None = None
    method_pinned_peak_bytes: int | None = Field(
        default=None, description="page-locked host memory, counted by the method from its own buffers at period ends"
    )
    method_pinned_why: str | None = None
    torch_pinned_peak_bytes: int | None = Field(
        default=None, description="of torch's own pinned pool, since the process began, blocks rounded up by torch"
    )
    torch_pinned_why: str | None = None
    device_allocated_peak_bytes: dict[str, int | None]
    device_reserved_peak_bytes: dict[str, int | None]
    device_why: str | None = None
    reserved_to_allocated_ratio: float | None = Field(default=None, description="of the peaks of steady steps")
    watched_steps: int | None = Field(default=None, description="whose parts were told apart; null on the CPU")
    alloc_conf: str | None = Field(default=None, description="PYTORCH_ALLOC_CONF; empty where it is not set")
    alloc_retries: int | None = Field(default=None, description="times the allocator ran out and emptied its cache")
    nvml_process_peak_bytes: int | None
    nvml_device_peak_bytes: int | None = Field(description="of the whole card, neighbours included")
    nvml_why: str | None = None
    nvml_device_delta_peak_bytes: int | None = Field(
        default=None, description="the card's peak less what was in use before this process first touched it"
    )
    nvml_delta_why: str | None = None
    nvml_source: Literal["process", "device delta"] | None = Field(
        default=None, description="which of the two says what this process held; the process where both are known"
    )
    nvml_poll_s: float | None = Field(default=None, description="time between two samples")
    foreign_why: str | None = Field(
        default=None, description="what else was seen on the GPU: device memory and all times of the run are null"
    )
    state_peak_bytes: int | None = Field(
        description="live tensors at step ends that belong neither to the model nor to the harness"
    )


class Timing(Record):
    """Times by the harness's clock; the observer, checkpoints and saving are not included."""

    load_s: float
    prepare_s: float | None
    train_s: float | None = Field(description="sum of the steps")
    processor_s: float | None = Field(
        default=None, description="processor time of the steps, all threads of rank 0 together; null on a GPU"
    )
    waited_s: float | None = Field(
        default=None, description="time in the steps that a thread was ready to run and no processor was free"
    )
    warmup_steps: int = Field(description="steps before the first timed one, which begins a period of the method")
    timed_steps: int | None = Field(default=None, description="whole periods of the method only")
    step_median_s: float | None
    step_p95_s: float | None
    throughput_tokens_per_s: float | None = Field(
        description="non-padding tokens of the timed steps, all processes together"
    )
    throughput_total_tokens_per_s: float | None = Field(default=None, description="the same with padding")
    throughput_why: str | None = Field(default=None, description="also why any other time here is null")
    clock: Literal["perf_counter", "cuda events"] | None = None
    device_synchronised: bool
    prepare_energy_j: float | None = Field(
        default=None,
        description="of `prepare_s`; as every energy here by the driver's counter of whole cards, idle power included, "
        "the cards of all processes together; null in records older than this",
    )
    prepare_energy_why: str | None = None
    train_energy_j: float | None = Field(
        default=None, description="sum of the steps, with the harness's looks at the weights within them"
    )
    energy_j_per_1000_tokens: float | None = Field(
        default=None, description="of the timed steps: joules per 1,000 of the tokens that throughput counts"
    )
    energy_why: str | None = Field(default=None, description="why an energy of the steps is null")


class GpuState(Record):
    """The driver's readings at one moment."""

    sm_clock_mhz: int | None
    memory_clock_mhz: int | None
    temperature_c: int | None
    power_w: float | None
    power_limit_w: float | None
    throttle_reasons: list[str] | None
    pcie_generation: int | None = Field(description="of the link now: an idle link falls back to an older one")
    pcie_lanes: int | None
    unread_why: dict[str, str] = Field(default_factory=dict, description="why a figure here is null, by its key")


class GpuRecord(Record):
    """The card of a run, by NVML."""

    name: str | None
    uuid: str | None
    mig: bool | None = Field(description="a part of a card in MIG mode; clocks, power and link are the card's")
    total_bytes: int | None
    driver: str | None
    driver_cuda: str | None = Field(description="newest CUDA that the driver serves")
    torch_cuda: str | None = Field(description="CUDA that torch was built with")
    pcie_max_generation: int | None
    pcie_max_lanes: int | None
    unread_why: dict[str, str] = Field(default_factory=dict, description="why a figure here is null, by its key")
    before: GpuState
    after: GpuState
    throttle_reasons_during: list[str] | None = Field(description="all that were seen while the run was sampled")


class TransferRates(Record):
    """Copies between pinned host memory and the device."""

    copy_bytes: int = Field(description="size of one copy in one direction")
    host_to_device_bytes_per_s: float | None
    device_to_host_bytes_per_s: float | None
    both_ways_bytes_per_s: float | None = Field(description="sum of both directions, copied at the same time")
    rates_why: str | None = None
