"""How steps are timed, which draws they meet, and how peaks are told apart by phase."""

from __future__ import annotations

from typing import Any

import efficiency_data as data
import pytest
import torch
from harness.efficiency.instruments import LEFTOVER_BYTES, Instruments
from harness.efficiency.measure import execute, state_bytes
from harness.efficiency.phases import PhasePeaks
from harness.efficiency.plan import Entry
from harness.efficiency.timing import watched_reach
from harness.efficiency.utilisation import utilisation
from harness.step.run import CellRun
from harness.step.worst_case import run_worst_draws

from baselines.lora import Lora


@pytest.fixture(scope="module")
def entries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Entry]:
    return data.tiny_entries(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def instruments() -> Instruments:
    return Instruments("cpu")


# ---------------------------------------------------------------- timing


def test_a_timing_block_has_whole_periods_and_says_what_it_saw(
    entries: dict[str, Entry], instruments: Instruments
) -> None:
    block = execute(data.job(entries["grass-decoder"], "timing"), instruments).timing
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


def test_methods_meet_the_same_draws_whenever_they_draw(entries: dict[str, Entry], instruments: Instruments) -> None:
    """GRASS draws as a period ends, LISA as the next one begins."""
    blocks = [execute(data.job(entries[m], "timing", repeat=1), instruments).timing for m in ("grass-decoder", "lisa")]
    assert blocks[0] is not None
    assert blocks[1] is not None
    assert blocks[0].draws == blocks[1].draws
    assert len(blocks[0].draws) == 2
    assert blocks[1].mean_reach == 1.0  # its embedding trains


def test_a_method_that_draws_nothing_has_no_period(entries: dict[str, Entry], instruments: Instruments) -> None:
    block = execute(data.job(entries["lora"], "timing"), instruments).timing
    assert block is not None
    assert (block.draws, block.own_period_steps, block.mean_reach) == ((), None, 1.0)
    assert block.tokens_per_s == pytest.approx(block.window_tokens_per_s)
    assert (block.probe_s, block.moved_bytes_per_step) == (None, None)
    assert block.copy_why == "the method keeps no history of copies"


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
        held.append(state_bytes(run.method.optimizer, "cpu"))
        return held[-1]

    run_worst_draws(run, count)
    assert held == sorted(held)
    assert state_bytes(run.method.optimizer, "cpu") == 4 * 35104  # two bf16 moments of every parameter
    assert state_bytes(run.method.optimizer, "cuda") == 0
    stepped = run.draws.taken[-phases.count("forward") // 2 :]
    assert set(stepped) == {(0, 3), (0, 1), (2, 3)}


class Counter:
    """An allocator with a script of peaks."""

    why = None

    def __init__(self, *peaks: int) -> None:
        self.script = list(peaks)
        self.restarts = 0

    def peaks(self) -> dict[str, int | None]:
        peak = self.script.pop(0)
        return {"allocated": peak, "reserved": 2 * peak}

    def restart(self) -> None:
        self.restarts += 1


def test_peaks_go_to_the_phase_that_ends() -> None:
    """Two steps; loading peaks highest and does not count; the first step is a phase beside the others."""
    draw = [(0, 3)]
    counter = Counter(95, 10, 20, 30, 25, 40, 90, 35)
    phases = PhasePeaks(counter, lambda: draw[-1])
    for phase in ("probe", "forward", "backward", "update", "forward", "backward", "update"):
        draw.append((1, 2)) if phase == "forward" and len(phases.allocated) > 3 else None
        phases.enter(phase)
    phases.close()
    assert phases.allocated == {
        "load": 95, "probe": 10, "forward": 40, "backward": 90, "update": 35, "first_step": 30,
    }  # fmt: skip
    assert phases.reserved["backward"] == 180
    assert (phases.peak_bytes, phases.peak_phase, phases.peak_draw) == (90, "backward", (1, 2))
    assert counter.restarts == 8


class FakeCuda:
    """`torch.cuda` as far as the instruments ask it, over a count that the test sets; peaks fall back when reset."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.peak = 100
        self.emptied = 0
        for name in ("memory_stats_as_nested_dict", "reset_peak_memory_stats", "memory_allocated", "empty_cache"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: self.peak)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: {"allocated_bytes.peak": 77}, raising=False)
        monkeypatch.setattr("harness.efficiency.instruments.transfer_rates", lambda: None)

    def hold(self, nbytes: int) -> None:
        self.now = nbytes
        self.peak = max(self.peak, nbytes)

    def memory_stats_as_nested_dict(self) -> dict[str, Any]:
        return {
            "allocated_bytes": {"all": {"peak": self.peak}},
            "reserved_bytes": {"all": {"peak": 2 * self.peak}},
            "num_alloc_retries": 3,
        }

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.now

    def memory_allocated(self) -> int:
        return self.now

    def empty_cache(self) -> None:
        self.emptied += 1


def test_on_a_gpu_the_record_has_peaks_by_phase(entries: dict[str, Entry], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the GPU's counters: backward holds 900 bytes, the update 700, everything else 100."""
    cuda = FakeCuda(monkeypatch)
    instruments = Instruments("cuda")
    seen: list[int] = []

    def backward(method: Lora, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()
        cuda.hold(900)
        cuda.hold(100)

    def end_step(method: Lora, replay: Any) -> None:
        cuda.hold(700)
        seen.append(torch.cuda.max_memory_allocated())
        cuda.hold(100)

    monkeypatch.setattr(Lora, "backward", backward)
    monkeypatch.setattr(Lora, "end_step", end_step)
    reply = execute(data.job(entries["lora"]), instruments)
    assert reply.clean
    block = reply.memory
    assert block is not None
    assert block.allocated_by_phase_bytes == {
        "load": 100, "probe": 100, "resample": 100, "forward": 100, "backward": 900, "update": 700, "first_step": 900,
    }  # fmt: skip
    assert (block.allocated_peak_bytes, block.reserved_peak_bytes, block.peak_phase) == (900, 1800, "backward")
    assert (block.allocated_before_bytes, block.alloc_retries, block.device_why) == (100, 0, None)
    assert block.torch_pinned_peak_bytes == 77
    assert seen == [900, 900]  # the meter's resets are hidden from the method
    assert cuda.emptied >= 3


def test_what_a_cell_leaves_behind_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    instruments = Instruments("cuda")
    cuda.hold(100 + LEFTOVER_BYTES)
    assert instruments.clean()
    cuda.hold(101 + LEFTOVER_BYTES)
    assert not instruments.clean()


def test_a_method_does_not_see_the_peak_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 7)
    phases = PhasePeaks(Counter(50, 10))
    with phases.unnoticed():
        assert torch.cuda.max_memory_allocated() == 7
        phases.enter("probe")
        assert torch.cuda.max_memory_allocated("cuda") == 50
    assert torch.cuda.max_memory_allocated() == 7
