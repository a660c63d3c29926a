"""What a run's record says of memory and time, and what a neighbour on the GPU takes away from it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import reporting_data as data
import torch
from fake_gpu import FakeCuda, FakeNvml
from harness.checking.tiny import LR, tiny_inputs, tiny_training
from harness.errors import UserError
from harness.measuring import processors
from harness.measuring.meters import Meters
from harness.measuring.processors import ProcessorTime
from harness.records import columns
from harness.records.columns import ADDED, FRAMES
from harness.records.reading import read_jsonl
from harness.records.run import EVALUATION, EvalRecord, SearchRecord, TrainRecord, largest
from harness.reporting import collecting
from harness.reporting.frames import Frames, read_frames, rows_to_frame, write_frames
from harness.reporting.run_tables import efficiency_table
from harness.reporting.score_tables import ACCURACY, HELDOUT_LOSS, score_table
from harness.reporting.table import Table
from harness.training import loop
from harness.training.loading import Inputs
from harness.training.logs import Log
from house import ROOT
from safetensors.torch import load_file

from baselines.method import StepFacts
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
    rows = [collecting._step_row("run", row) for row in read_jsonl(tmp_path / "beside" / "steps.jsonl")]
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


# ---------------------------------------------------------------- the log's times


def log_of(seconds: list[float]) -> Log:
    log = Log()
    batch = {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    for step, s in enumerate(seconds):
        facts = StepFacts(grad_norm=None, clipped=None)
        log.step(step, loss=1.0, factor=1.0, facts=facts, batches=[batch, batch], seconds=s)
    return log


def test_only_whole_periods_after_the_warm_up_are_timed() -> None:
    seconds = [float(n) for n in range(1, 51)]
    timing = log_of(seconds).timing(load_s=0.0, period_steps=8, clock="cuda events")
    # a warm-up of 5 steps ends in the first period, and the last two steps are no whole one
    timed = seconds[8:48]
    assert (timing.warmup_steps, timing.timed_steps) == (8, 40)
    assert timing.step_median_s == np.median(timed)
    assert timing.step_p95_s == np.quantile(timed, 0.95)
    assert timing.throughput_tokens_per_s == pytest.approx(10 * 40 / sum(timed))
    assert timing.throughput_total_tokens_per_s == pytest.approx(12 * 40 / sum(timed))
    assert timing.train_s == sum(seconds)
    assert (timing.clock, timing.device_synchronised) == ("cuda events", True)


def crowded_log(*steps: tuple[float, float, float | None]) -> Log:
    """Of steps with these (seconds, processor time, time waited)."""
    log = log_of([])
    for step, (seconds, ran, waited) in enumerate(steps):
        log.step(
            step, loss=1.0, factor=1.0, facts=StepFacts(grad_norm=None, clipped=None), batches=[], seconds=seconds,
            processor=ProcessorTime(ran, waited),
        )  # fmt: skip
    return log


@pytest.mark.parametrize(
    ("steps", "share"),
    [
        ([(1.0, 0.95, 0.05)] * 9, None),
        ([(1.0, 0.5, 0.5), (1.0, 1.0, 0.0)], 25),
        # one long wait among many steps is no reason
        ([(1.0, 1.0, 0.0)] * 19 + [(2.0, 1.0, 1.0)], None),
        # two threads: the processor time of both, and what both waited
        ([(1.0, 1.9, 0.1)], None),
        ([(1.0, 1.2, 0.8)], 40),
        # a process that sleeps waits for no processor
        ([(1.0, 0.3, 0.0)], None),
        # the kernel does not say: one thread at least has work to do all the time
        ([(1.0, 0.6, None)], 40),
        ([(1.0, 1.3, None)], None),
    ],
)
def test_a_wait_for_processors_is_a_share_of_the_time_wanted(
    steps: list[tuple[float, float, float | None]], share: int | None
) -> None:
    log = crowded_log(*steps)
    why = log.judge_times(foreign_why=None, alloc_retries=None)
    if share is None:
        assert (why, log.notes) == (None, [])
        assert None not in [row["step_s"] for row in log.steps]
    else:
        assert f"for {share} % of the time that the steps wanted one (10 % are allowed)" in str(why)
        assert {row["step_s"] for row in log.steps} == {None}


def test_steps_on_a_gpu_and_of_older_resume_states_wait_for_no_processor() -> None:
    log = log_of([0.5] * 3)
    del log.steps[0]["processor_s"]
    assert log.judge_times(foreign_why=None, alloc_retries=None) is None
    assert log.timing(load_s=0.0, period_steps=1, clock="cuda events").processor_s is None


@pytest.mark.parametrize(
    ("steps", "period", "excluded", "why"),
    [
        (0, 1, 0, "no step after the warm-up"),
        (3, 1, 3, "no step after the warm-up"),
        (60, 50, 50, "no whole period of 50 steps after the warm-up"),
    ],
)
def test_too_few_steps_have_no_throughput_and_a_reason(steps: int, period: int, excluded: int, why: str) -> None:
    timing = log_of([0.5] * steps).timing(load_s=0.0, period_steps=period, clock="perf_counter")
    assert (timing.throughput_tokens_per_s, timing.step_median_s, timing.step_p95_s) == (None, None, None)
    assert (timing.throughput_why, timing.timed_steps, timing.warmup_steps) == (why, 0, excluded)
    assert timing.train_s == 0.5 * steps


def test_steps_of_an_older_resume_state_have_no_count_of_padding() -> None:
    log = log_of([0.5] * 20)
    del log.steps[10]["total_tokens"]
    timing = log.timing(load_s=0.0, period_steps=1, clock="perf_counter")
    assert timing.throughput_total_tokens_per_s is None
    assert timing.throughput_tokens_per_s == pytest.approx(20.0)


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


# ---------------------------------------------------------------- tables


@pytest.fixture(scope="module")
def frames() -> Frames:
    return data.frames()


def header(table: Table) -> list[str]:
    return [str(column) for column in table.display.columns]


def grass_row(table: Table) -> dict[str, Any]:
    raw = table.raw
    (row,) = raw[(raw["method"] == "grass") & (raw["task"] == "arithmetic")].to_dict("records")
    return {str(key): value for key, value in row.items()}


def of_grass(frames: Frames) -> Any:
    return (frames.runs["method"] == "grass") & (frames.runs["task"] == "arithmetic")


def test_new_columns_are_shown_only_where_something_is_known(frames: Frames) -> None:
    study = data.study()
    table = efficiency_table(frames, study)
    assert {"step p95 (ms)", "tokens/s with padding"} <= set(header(table))
    unknown = {"host PSS (MiB)", "pinned by the method (MiB)", "device reserved (MiB)", "device delta (MiB)"}
    assert not unknown & set(header(table))
    assert "device_reserved_peak_bytes" in table.raw, "the csv has every column always"
    assert grass_row(table)["step_p95_s"] == 0.6

    runs = frames.runs.copy()
    runs.loc[of_grass(frames), ["host_pss_bytes", "nvml_device_delta_peak_bytes"]] = 3 * 2**20
    runs.loc[of_grass(frames), "method_pinned_peak_bytes"] = 0  # known, and nothing to show
    table = efficiency_table(replace(frames, runs=runs), study)
    assert unknown & set(header(table)) == {"host PSS (MiB)", "device delta (MiB)"}
    shown = dict(zip(table.display["method"], table.display["device delta (MiB)"], strict=True))
    assert shown["lisa"] == "—"
    assert "3.0" in set(table.display["host PSS (MiB)"])
    assert any("stands for the process where the driver does not list it" in note for note in table.footnotes)


def test_a_table_leaves_voided_runs_out_of_memory_and_speed_and_in_accuracy(frames: Frames) -> None:
    study = data.study()
    runs, mine = frames.runs.copy(), of_grass(frames)
    why = "another compute process was on the GPU during the run (pid 4711)"
    void = ["throughput_tokens_per_s", "throughput_total_tokens_per_s", "step_median_s", "step_p95_s", "train_s"]

    def voided(which: Any) -> Frames:
        runs.loc[which, void] = None
        runs.loc[which, "foreign_why"], runs.loc[which, "throughput_why"] = why, f"void: {why}"
        return replace(frames, runs=runs)

    one = voided(mine & (runs["seed"] == 0))
    table = efficiency_table(one, study)
    rest = frames.runs.loc[mine & (frames.runs["seed"] != 0), "throughput_tokens_per_s"]
    assert grass_row(table)["throughput_median_tokens_per_s"] == pytest.approx(rest.median())
    assert grass_row(table)["runs_beside_a_foreign_process"] == 1
    assert any(text.startswith("3; 1 not alone^") for text in table.display["ok runs"])
    assert any(note.endswith(f"count in no figure of device memory or speed: {why}.") for note in table.footnotes)
    for kind in (ACCURACY, HELDOUT_LOSS):
        pd.testing.assert_frame_equal(score_table(one, study, kind).raw, score_table(frames, study, kind).raw)

    table = efficiency_table(voided(mine), study)
    assert pd.isna(grass_row(table)["throughput_median_tokens_per_s"])
    assert pd.isna(grass_row(table)["throughput_ratio_to_full"])
    assert any(note.endswith(f"void: {why}") for note in table.footnotes), "where no run was alone, the dash says why"


def test_a_speed_beside_an_emptied_cache_is_marked(frames: Frames) -> None:
    study = data.study()
    runs = frames.runs.copy()
    mark = "the allocator ran out of memory and emptied its cache: the time is not comparable."
    for retries, marked in ((0, False), (2, True)):
        runs["alloc_retries"] = pd.array([retries] * len(runs), dtype="Int64")
        table = efficiency_table(replace(frames, runs=runs), study)
        assert any(mark in note for note in table.footnotes) == marked


def test_evaluation_is_no_part_of_a_runs_peak() -> None:
    assert largest({"load": 5, "steady": 9, "eval": 50, "save": None}, without=EVALUATION) == 9
    assert largest({"eval": 50}, without=EVALUATION) is None


# ---------------------------------------------------------------- what was written before


def test_published_records_and_tables_are_still_read() -> None:
    published = ROOT / "results" / "published"
    records = 0
    for kind, pattern in ((TrainRecord, "train.json"), (EvalRecord, "eval/*.json"), (SearchRecord, "search.json")):
        for file in published.glob(f"*/records/*/*/{pattern}"):
            kind.model_validate_json(file.read_bytes())
            records += 1
    assert records > 0
    for folder in {file.parent for file in published.glob("*/runs.parquet")}:
        frames = read_frames(folder)
        assert len(frames.runs) > 0
        assert {name: dict(getattr(frames, name).dtypes.astype(str)) for name in FRAMES} == FRAMES


def test_a_column_that_older_tables_lack_is_null_and_any_other_still_missed(frames: Frames, tmp_path: Path) -> None:
    write_frames(frames, tmp_path)
    frames.runs.drop(columns=list(ADDED["runs"])).to_parquet(tmp_path / "runs.parquet")
    assert read_frames(tmp_path).runs["timed_steps"].isna().all()
    frames.runs.drop(columns=["throughput_why"]).to_parquet(tmp_path / "runs.parquet")
    with pytest.raises(UserError, match="'throughput_why' is missing"):
        read_frames(tmp_path)


def test_steps_written_before_padding_was_counted_become_rows() -> None:
    old = {"step": 0, "loss": 1.0, "lr_factor": 1.0, "grad_norm": None, "clipped": None, "tokens": 9, "step_s": 0.1}
    rows = [collecting._step_row("run", row) for row in (old, {**old, "total_tokens": 12})]
    totals = rows_to_frame("steps", rows)["total_tokens"]
    assert totals.isna().tolist() == [True, False]
    assert totals.tolist()[1] == 12
