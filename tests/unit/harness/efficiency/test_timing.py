"""How steps are timed, which draws they meet, and how peaks are told apart by phase."""

from __future__ import annotations

from itertools import count
from typing import Any

import efficiency_data as data
import pytest
import torch
from fake_gpu import FakeCuda, FakeNvml
from harness.efficiency.measure import CellPhases, execute
from harness.efficiency.plan import Entry
from harness.efficiency.timing import watched_reach
from harness.efficiency.utilisation import utilisation
from harness.measuring import energy
from harness.measuring.census import state_bytes
from harness.measuring.clock import StepClock
from harness.measuring.meters import LEFTOVER_BYTES, Meters
from harness.step.cell import CellRun, Phase
from harness.step.worst_case import run_worst_case

from baselines.lora import Lora
from grass.host import Host, current, using


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Entry]:
    return data.tiny_entries(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def meters() -> Meters:
    return Meters("cpu")


# ---------------------------------------------------------------- timing


def test_a_timing_block_has_whole_periods_and_says_what_it_saw(entries: dict[str, Entry], meters: Meters) -> None:
    block = execute(data.job(entries["grass-decoder"], "timing"), meters).timing
    assert block is not None
    assert (block.clock, block.timed_steps, len(block.step_s), block.period_steps) == ("perf_counter", 10, 10, 5)
    assert block.own_period_steps == 50
    assert block.tokens == 10 * 2 * 16
    assert block.window_tokens_per_s == pytest.approx(block.tokens / sum(block.step_s))
    # backward stops at the lowest active layer: decoder layers alone train
    assert block.mean_reach == pytest.approx(sum(4 - min(draw) for draw in block.draws) / len(block.draws) / 4)
    assert block.moved_bytes_per_step is not None
    assert block.moved_bytes_per_step > 0
    assert block.offload_mode == "move"
    assert block.probe_batches == 2
    assert (block.mfu_share, block.mfu_why) == (None, "the run was on the CPU")
    assert block.window_energy_j is block.energy_j_per_1000_tokens is block.probe_energy_j is None
    assert block.energy_why == block.probe_energy_why == "the run was on the CPU"


def test_methods_meet_the_same_draws_whenever_they_draw(entries: dict[str, Entry], meters: Meters) -> None:
    """GRASS draws as a period ends, LISA as the next one begins."""
    blocks = [execute(data.job(entries[m], "timing", repeat=1), meters).timing for m in ("grass-decoder", "lisa")]
    assert blocks[0] is not None
    assert blocks[1] is not None
    assert blocks[0].draws == blocks[1].draws
    assert len(blocks[0].draws) == 2
    assert blocks[1].mean_reach == 1.0  # its embedding trains


def test_a_method_that_draws_nothing_has_no_period(entries: dict[str, Entry], meters: Meters) -> None:
    block = execute(data.job(entries["lora"], "timing"), meters).timing
    assert block is not None
    assert (block.draws, block.own_period_steps, block.mean_reach) == ((), None, 1.0)
    assert block.tokens_per_s == pytest.approx(block.window_tokens_per_s)
    assert (block.probe_s, block.moved_bytes_per_step) == (None, None)
    assert block.copy_why == "the method keeps no history of copies"


@pytest.mark.parametrize("method", ["lora", "grass-decoder"])
def test_energy_is_of_the_timed_steps_and_of_the_probe(
    method: str, entries: dict[str, Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A counter whose readings are the number of steps made so far, and two joules more after the probe."""
    made = {"probe": 0, "steps": 0}
    nvml = FakeNvml()
    nvml.energy = {"GPU-a": (1000 * (made["steps"] + 2 * made["probe"]) for _ in count())}
    _, meters = fake_gpu(nvml)

    def counted(of: str, call: Any) -> Any:
        def step(*arguments: Any, **named: Any) -> Any:
            call(*arguments, **named)
            made[of] += 1

        return step

    monkeypatch.setattr(CellRun, "prepare", counted("probe", CellRun.prepare))
    monkeypatch.setattr(CellRun, "step", counted("steps", CellRun.step))
    monkeypatch.setattr(energy, "SHORTEST_S", 3600.0)
    short = execute(data.job(entries[method], "timing"), meters).timing
    monkeypatch.setattr(energy, "SHORTEST_S", 0.0)
    block = execute(data.job(entries[method], "timing"), meters).timing
    assert short is not None
    assert block is not None
    assert (block.window_energy_j, block.energy_why) == (10.0, None)
    assert block.energy_j_per_1000_tokens == pytest.approx(1000 * 10.0 / block.tokens)
    none = (None, "the method measures nothing before its first step")
    assert (block.probe_energy_j, block.probe_energy_why) == ((2.0, None) if block.probe_batches else none)
    assert (short.window_energy_j, short.energy_j_per_1000_tokens) == (None, None)
    assert str(short.energy_why).endswith("s were measured, and the card's energy counter needs 3600 s")
    meters.close()


def test_mfu_is_needed_arithmetic_by_what_the_card_could_do(entries: dict[str, Entry]) -> None:
    """Full matrices of 32 x 48 and the like, by hand: LoRA's frozen base pays two passes, its factors three."""
    cell = entries["lora"].cell
    run = CellRun(cell, steps=1, device="cpu", enter=lambda phase: None)
    attention = 2 * 16 * 32 * 4  # causal, of 4 layers with 2 heads of 16
    base = 2 * sum(run.facts.layer_parameters) + attention + 2 * run.facts.head_parameters
    flop = 2 * base + 6 * run.promise.trainable_parameters
    found = utilisation(run, cell, tokens_per_s=1e6, card="NVIDIA H200")
    assert found == {"mfu_share": pytest.approx(1e6 * flop / 989e12)}
    assert utilisation(run, cell, tokens_per_s=1e6, card="Some GPU") == {
        "mfu_share": None,
        "mfu_why": "the peak rate of Some GPU is not known here",
    }


def test_reach_counts_the_layers_that_a_gradient_comes_to() -> None:
    layers = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(4))
    for layer in layers[:2]:
        layer.requires_grad_(False)
    hidden = torch.ones(1, 3)
    with watched_reach(list(layers)) as visited:
        for layer in layers:
            hidden = layer(hidden)
        hidden.sum().backward()
    assert visited == {2, 3}
    assert not any(layer._forward_hooks for layer in layers)


# ---------------------------------------------------------------- worst draws and phases


def test_every_candidate_draw_is_stepped_after_every_layer_was_visited(entries: dict[str, Entry]) -> None:
    phases: list[str] = []
    run = CellRun(entries["lisa"].cell, steps=10, device="cpu", enter=phases.append)
    run.prepare()
    held: list[int] = []

    def count() -> int:
        held.append(state_bytes(run.method.optimizer, counts=lambda tensor: tensor.device.type == "cpu"))
        return held[-1]

    run_worst_case(run, held_bytes=count)
    assert held == sorted(held)
    assert (
        state_bytes(run.method.optimizer, counts=lambda tensor: tensor.device.type == "cpu") == 4 * 35104
    )  # two bf16 moments of every parameter
    assert state_bytes(run.method.optimizer, counts=lambda tensor: tensor.device.type == "cuda") == 0
    stepped = run.draws.made[-phases.count("forward") // 2 :]
    assert set(stepped) == {(0, 3), (0, 1), (2, 3)}


STEPS: tuple[tuple[Phase, int], ...] = (
    ("probe", 10), ("forward", 20), ("backward", 30), ("update", 25), ("forward", 40), ("backward", 90), ("update", 35),
)  # fmt: skip
"""Phases of two steps, and the most that is held in each."""


def test_peaks_go_to_the_phase_that_ends() -> None:
    """Two steps; loading peaks highest and does not count; the first step is a phase beside the others."""
    cuda = FakeCuda()
    meters = Meters("cuda", cuda=cuda, nvml=FakeNvml())
    draw = [(0, 3)]
    phases = CellPhases(meters, lambda: draw[-1])
    cuda.use(95)
    cuda.use(0)
    for number, (phase, held) in enumerate(STEPS):
        phases.enter(phase)
        if number == 4:
            draw.append((1, 2))
        cuda.use(held)
        cuda.use(0)
    phases.close()
    assert meters.record(state_peak_bytes=None).device_allocated_peak_bytes == {
        "load": 95, "probe": 10, "forward": 40, "backward": 90, "update": 35, "first_step": 30,
    }  # fmt: skip
    assert (phases.peak_bytes, phases.peak_phase, phases.peak_draw) == (90, "backward", (1, 2))


class CountedBy(Host):
    """A host whose device counts as the stand-in does, and on which 20 bytes can be had."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def peak_bytes(self, device: torch.device) -> int:
        return self._cuda.peak

    def obtainable_bytes(self, device: torch.device) -> int:
        return 20


def fake_gpu(nvml: FakeNvml | None = None) -> tuple[FakeCuda, Meters]:
    """Meters that believe in a GPU on which 100 bytes are held already."""
    cuda = FakeCuda()
    cuda.use(100)
    cuda.retries = 3
    return cuda, Meters("cuda", cuda=cuda, nvml=FakeNvml() if nvml is None else nvml)


def test_on_a_gpu_the_record_has_peaks_by_phase(entries: dict[str, Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the GPU's counters: backward holds 900 bytes, the update 700, everything else 100."""
    cuda, meters = fake_gpu()
    seen: list[int | None] = []

    def backward(method: Lora, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()
        cuda.use(900)
        cuda.use(100)

    def end_step(method: Lora, replay: Any) -> None:
        cuda.use(700)
        seen.append(current().peak_bytes(torch.device("cuda")))
        cuda.use(100)

    monkeypatch.setattr(Lora, "backward", backward)
    monkeypatch.setattr(Lora, "end_step", end_step)
    with using(CountedBy(cuda)):
        reply = execute(data.job(entries["lora"]), meters)
    assert reply.clean
    block = reply.memory
    assert block is not None
    assert block.device_allocated_peak_bytes == {
        "load": 100, "probe": 100, "resample": 100, "forward": 100, "backward": 900, "update": 700, "first_step": 900,
    }  # fmt: skip
    assert (block.allocated_peak_bytes, block.reserved_peak_bytes, block.peak_phase) == (900, 900, "backward")
    assert (block.allocated_before_bytes, block.alloc_retries, block.device_why) == (100, 0, None)
    assert block.torch_pinned_peak_bytes == 4096
    # once memory was at 900, the meter's resets are hidden from the method
    assert [peak for peak in seen if peak != 700] == [900, 900]
    again = execute(data.job(entries["lora"]), meters).memory
    assert again is not None
    assert again.device_allocated_peak_bytes == block.device_allocated_peak_bytes, "each cell begins anew"


def test_what_a_cell_leaves_behind_is_noticed() -> None:
    cuda, meters = fake_gpu()
    assert meters.clean(), "what is there at first was there before"
    cuda.use(100 + LEFTOVER_BYTES)
    assert meters.clean()
    cuda.use(101 + LEFTOVER_BYTES)
    assert not meters.clean()


def test_a_method_does_not_see_the_peak_fall_back() -> None:
    cuda, meters = fake_gpu()
    device = torch.device("cuda")
    with using(CountedBy(cuda)):
        with meters.peak_kept():
            assert current().peak_bytes(device) == 100
            with meters.phase("probe"):
                cuda.use(500)
                cuda.use(70)
            meters.begin("forward")
            assert cuda.peak == 70
            assert current().peak_bytes(device) == 500
            assert current().obtainable_bytes(device) == 20
        assert current().peak_bytes(device) == 70


def test_where_nobody_counts_there_is_no_peak_to_follow() -> None:
    with Meters("cpu").peak_kept():
        assert current().peak_bytes(torch.device("cpu")) is None


def test_laps_are_read_when_all_is_over() -> None:
    cuda = FakeCuda()
    clock = StepClock("cuda", cuda)
    clock.start()
    for milliseconds in (30, 12, 5):
        cuda.work(milliseconds)
        clock.lap()
    assert cuda.waited == 0, "nothing is waited for between the steps"
    assert clock.laps() == pytest.approx([0.030, 0.012, 0.005])
    assert cuda.waited == 1
