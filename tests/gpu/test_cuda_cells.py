"""On a CUDA device: cells measured by the meters and the clock that runs use, and copies without overlap."""

from __future__ import annotations

from pathlib import Path

import efficiency_data as data
import pytest
import torch
from harness.efficiency.jobs import Job
from harness.efficiency.measure import execute
from harness.efficiency.serial import SerialHost
from harness.measuring.clock import StepClock
from harness.measuring.meters import Meters

from grass.host import current, using

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def meters() -> Meters:
    found = Meters("cuda")
    found.describe()
    assert found.clean()
    return found


def on_cuda(folder: Path, method: str, do: str) -> Job:
    return data.job(data.tiny_entries(folder)[method], do).model_copy(update={"device": "cuda"})


@pytest.mark.parametrize("method", ["lora", "grass-decoder"])
def test_a_cells_peak_is_the_highest_of_its_phases_and_nothing_stays(
    method: str, meters: Meters, tmp_path: Path
) -> None:
    reply = execute(on_cuda(tmp_path, method, "memory"), meters)
    assert (reply.status, reply.clean) == ("ok", True)
    block = reply.memory
    assert block is not None
    phases = {phase: peak for phase, peak in block.device_allocated_peak_bytes.items() if phase != "load"}
    assert {"forward", "backward", "update", "first_step"} <= phases.keys()
    assert block.allocated_peak_bytes == max(peak for peak in phases.values() if peak is not None)
    assert block.peak_phase is not None
    assert phases[block.peak_phase] == block.allocated_peak_bytes
    assert block.reserved_peak_bytes is not None
    assert block.reserved_peak_bytes >= block.allocated_peak_bytes


def test_cells_are_timed_with_and_without_overlap(meters: Meters, tmp_path: Path) -> None:
    job = on_cuda(tmp_path, "grass-decoder", "timing")
    overlapped = execute(job, meters).timing
    with using(SerialHost(current())):
        serial = execute(job, meters).timing
    assert overlapped is not None
    assert serial is not None
    for block in (overlapped, serial):
        assert block.clock == "cuda events"
        assert min(block.step_s) > 0
    assert overlapped.draws == serial.draws, "the same layers train, so steps can be compared one by one"


def test_laps_of_the_clock_add_up() -> None:
    clock = StepClock("cuda")
    weights = torch.randn(1024, 1024, device="cuda")
    whole = StepClock("cuda")
    whole.start()
    clock.start()
    for _ in range(5):
        weights = weights @ weights / 32
        clock.lap()
    total, laps = whole.stop(), clock.laps()
    assert len(laps) == 5
    assert sum(laps) <= total * 1.05
