"""`python -m harness efficiency --overhead`: what GRASS costs beside plain AdamW, and what moving its states costs.

Ratios of times, each pair measured by turns in this one run. Nothing is asserted.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from harness.efficiency.budget import Budget
from harness.efficiency.overhead_host import HostPart, measure_host
from harness.efficiency.overhead_offload import OffloadBench, OffloadPart, variant_runs
from harness.efficiency.spec import EfficiencyStudy
from harness.efficiency.store import MeasureOptions, write_session
from harness.measuring.meters import Meters
from harness.records.code import measurement
from harness.records.device import DeviceRecord, StrictRecord
from harness.records.provenance import provenance
from harness.records.record import Provenance


class OverheadRecord(StrictRecord):
    """One measurement of the overhead."""

    device: DeviceRecord
    repeats: int
    timed_steps: int
    warmup_steps: int
    host: HostPart
    offload: OffloadPart | None
    spent_s: float
    provenance: Provenance


def measure_overhead(
    study: EfficiencyStudy, meters: Meters, asked: MeasureOptions, budget: Budget, *, config: Path, folder: Path
) -> OverheadRecord:
    """Measure both parts, print what they say, and write a record of its own under `folder`/overhead/.

    Args:
        study: with the cell in which states are moved.
        meters: of this process.
        asked: of that cell; the host part makes as many rounds as a repeat has timed steps.
        budget: of everything; the host part is never cut short, and the other one begins no block that may not fit.
        config: the study's file.
        folder: for the record.

    Raises:
        UserError: the study's method has no states to move.
    """
    chosen = study.overhead
    counts = () if chosen is None else chosen.active_layers
    runs = [variant_runs(study, chosen, meters.device, active) for active in counts if chosen is not None]
    device = meters.describe()
    with warnings.catch_warnings():
        # layers of random weights matter alike, and GRASS says so
        warnings.filterwarnings("ignore", message="GRASS is near uniform")
        host = measure_host(asked.timed_steps)
        offload = None if chosen is None else OffloadBench(chosen, meters, asked, budget).measure(runs, device)
    record = OverheadRecord(
        device=device,
        repeats=asked.repeats,
        timed_steps=asked.timed_steps,
        warmup_steps=asked.warmup_steps,
        host=host,
        offload=offload,
        spent_s=budget.spent(),
        provenance=provenance(
            roots=("harness.efficiency.overhead", *measurement("grass")),
            inputs={"study": config},
            device=device.name,
        ),
    )
    path = write_session(record, folder / "overhead")
    print(f"all of it, units in the keys: {path}")
    return record
