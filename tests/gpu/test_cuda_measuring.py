"""On a CUDA device: leases, the driver's figures beside torch's, the parts of a step, the clock and the copies."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from harness.checking.contract import Case
from harness.checking.tiny import tiny_inputs
from harness.measuring.clock import StepClock
from harness.measuring.device import AllocatorMeter, PhasePeaks
from harness.measuring.meters import Meters
from harness.measuring.rates import transfer_rates

from baselines import find_method

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MIB = 2**20

LEASED = """
import json, sys
from pathlib import Path
from harness.measuring.gpu import gpu_lease
with gpu_lease(folder=Path(sys.argv[1])) as device:
    import torch
    from harness.measuring.nvml import NvmlMeter
    meter = NvmlMeter("cuda")
    block = torch.ones(512 * 2**20, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    meter.close()
    record, why = meter.gpu_record()
    print(json.dumps({
        "uuid": device.uuid, "count": torch.cuda.device_count(), "name": torch.cuda.get_device_name(),
        "leased": device.name, "process": meter.process_peak_bytes, "process_why": meter.process_why,
        "delta": meter.delta_peak_bytes, "delta_why": meter.delta_why, "source": meter.source,
        "foreign": meter.foreign_why, "gpu": None if record is None else record.model_dump(), "gpu_why": why,
    }))
"""


def test_a_leased_process_sees_one_gpu_and_the_driver_sees_its_memory(tmp_path: Path) -> None:
    found = subprocess.run([sys.executable, "-c", LEASED, str(tmp_path)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    told = json.loads(found.stdout)
    assert told["count"] == 1
    assert told["leased"].startswith(told["name"])
    assert told["process_why"] is not None or told["process"] > 512 * MIB
    assert told["delta_why"] is not None or told["delta"] > 512 * MIB
    if told["process"] is not None and told["delta"] is not None:
        assert abs(told["process"] - told["delta"]) < 256 * MIB
    assert told["gpu_why"] is None
    assert told["gpu"]["uuid"] == told["uuid"]
    assert told["gpu"]["before"]["sm_clock_mhz"] > 0
    assert told["gpu"]["total_bytes"] > 0


def test_a_process_that_already_computes_is_refused_a_lease(tmp_path: Path) -> None:
    code = (
        "import torch; torch.ones(1, device='cuda'); from harness.measuring.gpu import gpu_lease\nwith gpu_lease(): 0"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "take the GPU lease before torch is used" in found.stderr


def test_peaks_within_peaks_are_the_allocators_own() -> None:
    meter = AllocatorMeter("cuda")
    nested = PhasePeaks(AllocatorMeter.KINDS, meter.peaks, meter.restart)
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated()

    def use(mebibytes: int) -> None:
        torch.empty(mebibytes * MIB, dtype=torch.uint8, device="cuda")

    with nested.phase("step"):
        use(64)
        with nested.phase("forward"):
            use(32)
        with nested.phase("backward"):
            use(16)
    peaks = {name: (peak or 0) - base for name, peak in nested.by_phase["allocated"].items()}
    assert peaks == {"forward": 32 * MIB, "backward": 16 * MIB, "step": 64 * MIB}


@pytest.mark.parametrize("module", ["full", "lora", "grass"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_run_has_parts_of_steps_event_times_and_its_card(module: str, tmp_path: Path) -> None:
    case = Case(module, find_method(module).EXAMPLES[0], tiny_inputs(tmp_path / "inputs"), tmp_path)
    record = case.train("run", device="cuda")
    memory, timing = record.memory, record.timing
    assert memory is not None
    assert timing is not None
    assert timing.clock == "cuda events"
    if memory.foreign_why is None:
        peaks = memory.device_allocated_peak_bytes
        assert {"load", "prepare", "first_step", "steady", "eval", "save", "forward", "backward", "update"} <= set(
            peaks
        )
        assert max(peaks[part] or 0 for part in ("forward", "backward", "update")) <= (peaks["steady"] or 0)
        assert (timing.throughput_tokens_per_s or 0) > 0
    assert memory.alloc_retries == 0
    assert record.gpu is not None
    assert record.gpu.name is not None
    if module == "grass":
        assert (memory.method_pinned_peak_bytes or 0) > 0


def test_the_clock_of_a_step_is_the_devices_own_and_leaves_pauses_out() -> None:
    matrix = torch.randn(4096, 4096, device="cuda")

    def work(times: int) -> None:
        for _ in range(times):
            torch.mm(matrix, matrix)

    work(5)
    torch.cuda.synchronize()
    clock = StepClock("cuda")
    clock.start()
    work(20)
    short = clock.stop()
    clock.start()
    work(20)
    with clock.paused():
        work(200)
    assert clock.stop() < 5 * short


def test_the_card_counts_more_joules_when_it_works() -> None:
    meters = Meters("cuda")
    matrix = torch.randn(8192, 8192, device="cuda")

    def spent(seconds: float, *, busy: bool) -> float:
        torch.cuda.synchronize()
        meters.start_energy()
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            if busy:
                torch.mm(matrix, matrix)
                torch.cuda.synchronize()
            else:
                time.sleep(0.01)
        found = meters.stop_energy()
        if found.j is None:
            pytest.skip(f"this card gives no energy: {found.why}")
        return found.j

    try:
        assert spent(1.0, busy=True) > 0
        idle, busy = spent(3.0, busy=False), spent(3.0, busy=True)
        card, _ = meters.card_now()
    finally:
        meters.close()
    assert 0 < idle < busy
    # joules: no card takes more than its limit, up to a tenth for what the counter lags and the power overshoots
    if card is not None and card.power_limit_w is not None:
        assert busy <= 1.1 * 3.0 * card.power_limit_w


def test_copies_have_a_rate_each_way() -> None:
    rates = transfer_rates(copy_bytes=64 * MIB)
    assert rates.rates_why is None
    one, other, both = (
        rates.host_to_device_bytes_per_s or 0, rates.device_to_host_bytes_per_s or 0, rates.both_ways_bytes_per_s or 0,
    )  # fmt: skip
    assert min(one, other) > 10**8
    assert both > 0.8 * max(one, other)
