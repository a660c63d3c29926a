"""`python -m harness efficiency --overhead`: what GRASS costs beside plain AdamW, and what moving its states costs.

Ratios of times, each pair measured by turns in this one run. Nothing is asserted.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from harness.efficiency.budget import Budget
from harness.efficiency.identity import measured_by
from harness.efficiency.overhead_host import HostPart, measure_host
from harness.efficiency.overhead_offload import ACTIVE_LAYERS, OffloadBench, OffloadPart, variant_runs
from harness.efficiency.store import Asked
from harness.measuring.meters import Meters
from harness.records import atomic
from harness.records.device import DeviceRecord, StrictRecord
from harness.records.provenance import provenance
from harness.records.run import Provenance
from harness.step.spec import EfficiencyStudy


class OverheadRecord(StrictRecord):
    """The whole of `overhead.json`."""

    device: DeviceRecord
    repeats: int
    timed_steps: int
    warmup_steps: int
    host: HostPart
    offload: OffloadPart
    spent_s: float
    provenance: Provenance


def measure_overhead(
    study: EfficiencyStudy, meters: Meters, asked: Asked, budget: Budget, *, config: Path, folder: Path
) -> OverheadRecord:
    """Measure both parts, print what they say, and write `folder`/overhead.json.

    Args:
        study: with the cell in which states are moved.
        meters: of this process.
        asked: of that cell; the host part makes as many rounds as a repeat has timed steps.
        budget: of everything; the host part is never cut short, and the other one begins no block that may not fit.
        config: the study's file.
        folder: for the record.

    Raises:
        UserError: the study lacks that cell.
    """
    runs = [variant_runs(study, meters.device, active) for active in ACTIVE_LAYERS]
    device = meters.describe()
    with warnings.catch_warnings():
        # layers of random weights matter alike, and GRASS says so
        warnings.filterwarnings("ignore", message="GRASS is near uniform")
        host = measure_host(asked.timed_steps)
        offload = OffloadBench(meters, asked, budget).measure(runs, device)
    parts = ("overhead", "overhead_host", "overhead_offload", "serial", "by_turns")
    record = OverheadRecord(
        device=device,
        repeats=asked.repeats,
        timed_steps=asked.timed_steps,
        warmup_steps=asked.warmup_steps,
        host=host,
        offload=offload,
        spent_s=budget.spent(),
        provenance=provenance(
            sources=(*measured_by(runs[0][0].entry.cell), *(f"harness.efficiency.{part}" for part in parts)),
            inputs={"study": config},
            device=device.name,
        ),
    )
    path = folder / "overhead.json"
    atomic.write_text(path, record.model_dump_json(indent=2) + "\n")
    print(f"all of it, units in the keys: {path}")
    return record
