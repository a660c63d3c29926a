"""What a run's record says of memory and time, and what a neighbour on the GPU takes away from it."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_gpu import FakeCuda, FakeNvml
from harness.checking.tiny import LR, tiny_inputs, tiny_training
from harness.measuring import energy, processors
from harness.measuring.meters import Meters
from harness.records import columns
from harness.records.columns import FRAMES
from harness.records.reading import read_jsonl
from harness.records.run import TrainRecord
from harness.reporting import record_rows
from harness.reporting.frames import rows_to_frame
from harness.training import loop
from harness.training.loading import Inputs
from safetensors.torch import load_file

from grass.offload.arena import HostArena

GRASS = {"active_layers": 2, "sample_every": 3, "probe_steps": 2}
ME, STRANGER = os.getpid(), 4711


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return tiny_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def _processors_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else this machine does now."""
    monkeypatch.setattr(processors, "_waited_s", lambda: 0.0)


class RunningCuda(FakeCuda):
    """Every reading finds a little more in use, so that no two phases have the same peak."""

    def memory_stats_as_nested_dict(self) -> dict[str, Any]:
        self.use(self.now + 1)
        return super().memory_stats_as_nested_dict()


def train(
    module: str,
    options: dict[str, Any],
    inputs: Inputs,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    nvml: FakeNvml | None = None,
    cuda: FakeCuda | None = None,
) -> TrainRecord:
    """A run on the CPU whose meters believe that it is on a GPU, where `nvml` is given."""
    if nvml is not None:
        meters = Meters("cuda", cuda=cuda or RunningCuda(), nvml=nvml)
        monkeypatch.setattr(loop, "Meters", lambda device: meters)
    return loop.train(
        tiny_training(module, options), name="run", lr=LR, lr_searched=False, seed=0, inputs=inputs, folder=folder
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


# ---------------------------------------------------------------- the loop


@pytest.mark.parametrize(("module", "options", "last"), [("grass", GRASS, {"resample"}), ("full", {}, set())])
def test_parts_of_steps_are_told_apart_and_change_nothing(
    module: str, options: dict[str, Any], last: set[str], inputs: Inputs, tmp_path: Path, monkeypatch: Any
) -> None:
    train(module, options, inputs, tmp_path / "plain", monkeypatch)
    cuda = RunningCuda()
    record = train(module, options, inputs, tmp_path / "seen", monkeypatch, nvml=FakeNvml(), cuda=cuda)
    assert record.status == "ok"
    memory = record.memory
    assert memory is not None
    outer = {"load", "prepare", "first_step", "steady", "eval", "save"}
    # the last step of a period, where a method with a period draws anew, is watched in every second one
    assert set(memory.device_allocated_peak_bytes) == outer | {"forward", "backward", "update"} | last
    assert set(memory.host_peak_bytes) == outer
    assert memory.watched_steps == 3
    parts = [memory.device_allocated_peak_bytes[part] or 0 for part in ("forward", "backward", "update")]
    assert 0 < max(parts) <= (memory.device_allocated_peak_bytes["steady"] or 0)
    plain, seen = weights(tmp_path / "plain"), weights(tmp_path / "seen")
    assert all(torch.equal(plain[name], seen[name]) for name in plain)


def test_on_the_cpu_a_record_has_times_and_host_memory_and_reasons_for_the_rest(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = train("grass", GRASS, inputs, tmp_path, monkeypatch)
    timing, memory = record.timing, record.memory
    assert timing is not None
    assert memory is not None
    # warm-up of 3, whole periods of 3
    assert (timing.warmup_steps, timing.timed_steps, timing.clock) == (3, 9, "perf_counter")
    assert timing.throughput_tokens_per_s is not None
    assert timing.throughput_total_tokens_per_s is not None
    assert timing.throughput_total_tokens_per_s > timing.throughput_tokens_per_s, "rows are padded"
    assert (record.gpu, record.gpu_why) == (None, "the run was on the CPU")
    assert memory.method_pinned_peak_bytes == 0, "GRASS says that it pinned nothing"
    assert set(memory.device_allocated_peak_bytes) == {"load", "prepare", "first_step", "steady", "eval", "save"}
    other = train("full", {}, inputs, tmp_path / "full", monkeypatch)
    assert other.memory is not None
    assert (other.memory.method_pinned_peak_bytes, other.memory.method_pinned_why) == (None, "the method did not say")


def test_a_foreign_process_voids_memory_and_speed_but_not_accuracy(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = train("full", {}, inputs, tmp_path / "alone", monkeypatch, nvml=FakeNvml(processes=[[], [(ME, 9)]]))
    shared = FakeNvml(processes=[[], [(ME, 9), (STRANGER, 5)]])
    beside = train("full", {}, inputs, tmp_path / "beside", monkeypatch, nvml=shared)
    why = "another compute process was on the GPU during the run (pid 4711)"
    assert alone.memory is not None
    assert alone.timing is not None
    assert alone.memory.foreign_why is None
    assert alone.timing.throughput_tokens_per_s is not None
    assert beside.memory is not None
    assert beside.timing is not None
    assert beside.memory.foreign_why == why
    for void in (beside.memory.device_allocated_peak_bytes, beside.memory.device_reserved_peak_bytes):
        assert set(void.values()) == {None}
    times = beside.timing
    assert times.train_s is times.prepare_s is times.step_median_s is times.step_p95_s is None
    assert times.throughput_tokens_per_s is times.throughput_total_tokens_per_s is None
    assert times.throughput_why == beside.memory.device_why == f"void: {why}"
    assert {row["step_s"] for row in read_jsonl(tmp_path / "beside" / "steps.jsonl")} == {None}
    assert f"memory and speed are void: {why}" in beside.notes
    assert (beside.status, beside.validation_loss, beside.train_loss) == ("ok", alone.validation_loss, alone.train_loss)
    assert beside.memory.state_peak_bytes == alone.memory.state_peak_bytes

    row = {name: column.of(beside) for name, column in columns.RUNS.items()}
    assert row.keys() | columns.LEFT_OUT.keys() == FRAMES["runs"].keys()
    assert (row["foreign_why"], row["throughput_why"]) == (why, f"void: {why}")
    for key in ("throughput_tokens_per_s", "device_allocated_peak_bytes", "nvml_process_peak_bytes", "train_s"):
        assert row[key] is None
    assert row["validation_loss"] == alone.validation_loss


def test_other_work_on_the_processors_voids_speed_alone(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = train("full", {}, inputs, tmp_path / "alone", monkeypatch)
    assert alone.timing is not None
    assert alone.timing.throughput_tokens_per_s is not None
    assert alone.timing.waited_s == 0
    seconds = iter(range(10_000))
    monkeypatch.setattr(processors, "_waited_s", lambda: float(next(seconds)))
    beside = train("full", {}, inputs, tmp_path / "beside", monkeypatch)
    times = beside.timing
    assert times is not None
    assert times.train_s is times.prepare_s is times.step_median_s is times.step_p95_s is None
    assert times.throughput_tokens_per_s is times.throughput_total_tokens_per_s is None
    why = str(times.throughput_why)
    assert why.startswith("void: other work held the processors for ")
    assert f"speed is {why}" in beside.notes
    assert times.processor_s is not None
    assert times.waited_s is not None
    assert times.waited_s >= 12, "one second a step at least"
    assert {row["step_s"] for row in read_jsonl(tmp_path / "beside" / "steps.jsonl")} == {None}
    assert beside.memory is not None
    assert beside.memory.host_peak_bytes["steady"] is not None
    assert (beside.status, beside.validation_loss) == ("ok", alone.validation_loss)
    rows = [record_rows.step_row("run", row) for row in read_jsonl(tmp_path / "beside" / "steps.jsonl")]
    assert rows_to_frame("steps", rows)["step_s"].isna().all()


def test_an_allocator_that_ran_out_marks_the_runs_times(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Tight(FakeCuda):
        def empty_cache(self) -> None:
            self.retries = 1  # anything that happens between the start and the end of the run

    record = train("full", {}, inputs, tmp_path, monkeypatch, nvml=FakeNvml(), cuda=Tight())
    assert record.memory is not None
    assert record.memory.alloc_retries == 1
    assert "the allocator ran out of memory and emptied its cache 1 times, on the steps' clock" in record.notes
    assert record.timing is not None
    assert record.timing.throughput_tokens_per_s is not None


# ---------------------------------------------------------------- energy


def counted() -> FakeNvml:
    """A card whose counter is one joule further at every reading."""
    nvml = FakeNvml(processes=[[], [(ME, 9)]])
    nvml.energy = {"GPU-a": count(5_000_000, 1000)}
    return nvml


def test_a_run_has_the_energy_of_its_steps_and_of_nothing_between_them(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "SHORTEST_S", 0.0)
    timing = train("grass", GRASS, inputs, tmp_path, monkeypatch, nvml=counted()).timing
    assert timing is not None
    rows = read_jsonl(tmp_path / "steps.jsonl")
    # two readings a span: what the counter moves between two spans is in none
    assert [row["energy_j"] for row in rows] == [1.0] * len(rows)
    assert (timing.prepare_energy_j, timing.prepare_energy_why) == (1.0, None)
    assert (timing.train_energy_j, timing.energy_why) == (len(rows), None)
    timed = rows[timing.warmup_steps :][: timing.timed_steps]
    assert timing.energy_j_per_1000_tokens == pytest.approx(1000 * len(timed) / sum(row["tokens"] for row in timed))


def test_a_run_that_was_soon_over_has_no_energy(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "SHORTEST_S", 3600.0)
    timing = train("full", {}, inputs, tmp_path, monkeypatch, nvml=counted()).timing
    assert timing is not None
    assert timing.prepare_energy_j is timing.train_energy_j is timing.energy_j_per_1000_tokens is None
    assert str(timing.energy_why).endswith("s were measured, and the card's energy counter needs 3600 s")
    assert str(timing.prepare_energy_why).endswith("s were measured, and the card's energy counter needs 3600 s")


@pytest.mark.parametrize("where", ["on the card of rank 0", "on another rank's"])
def test_a_stranger_on_any_card_of_a_run_voids_its_energy(
    where: str, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(energy, "SHORTEST_S", 0.0)
    nvml, why = counted(), "void: another compute process was on the GPU during the run (pid 4711)"
    if where == "on another rank's":
        monkeypatch.setattr(loop, "gathered", lambda mine: [None, why] if mine is None else [mine])
    else:
        nvml.lists[1:] = [[(ME, 9), (STRANGER, 5)]]
    record = train("full", {}, inputs, tmp_path, monkeypatch, nvml=nvml)
    timing = record.timing
    assert timing is not None
    assert timing.prepare_energy_j is timing.train_energy_j is timing.energy_j_per_1000_tokens is None
    assert timing.energy_why == timing.prepare_energy_why == why
    assert {row["energy_j"] for row in read_jsonl(tmp_path / "steps.jsonl")} == {None}
    row = {name: column.of(record) for name, column in columns.RUNS.items()}
    assert (row["train_energy_j"], row["energy_j_per_1000_tokens"], row["energy_why"]) == (None, None, why)


def test_on_the_cpu_and_without_a_counter_energy_is_null_with_the_reason(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for nvml, why in (
        (None, "the run was on the CPU"),
        (FakeNvml(), "the card's energy counter cannot be read (NVML: Not Supported)"),
    ):
        timing = train("full", {}, inputs, tmp_path / str(nvml is None), monkeypatch, nvml=nvml).timing
        assert timing is not None
        assert timing.prepare_energy_j is timing.train_energy_j is timing.energy_j_per_1000_tokens is None
        assert timing.energy_why == timing.prepare_energy_why == why


# ---------------------------------------------------------------- pinned memory, by construction


def test_the_arena_counts_what_it_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = [0, 2]
    runtime = SimpleNamespace(cudaHostRegister=lambda *_: codes.pop(0), cudaHostUnregister=lambda _: 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr("grass.offload.arena._forget_last_error", lambda: None)
    arena = HostArena(pin=True, settle=lambda: None)
    first = arena.take(1000, torch.float32)
    with pytest.warns(UserWarning, match="could not pin"):
        arena.take(500, torch.float32)
    assert (arena.pinned_bytes, arena.nbytes) == (8000, 12_000)
    arena.release(first)
    assert (arena.pinned_bytes, arena.nbytes) == (0, 4000)
    assert HostArena(pin=False, settle=lambda: None).pinned_bytes == 0
