"""`--overhead`: it runs on a bare machine, its ratios are of like with like, and its record can be read."""

from __future__ import annotations

import itertools
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import efficiency_data as data
import pytest
import torch
from bare_machine import modules_beside, without
from efficiency_data import NO_TIME as TINY
from harness.__main__ import main
from harness.efficiency import overhead_host, overhead_offload
from harness.efficiency.budget import Budget
from harness.efficiency.by_turns import Spread, interleaved, ratios, timed_calls
from harness.efficiency.jobs import Job, Reply
from harness.efficiency.overhead import OverheadRecord
from harness.efficiency.overhead_host import BOOKKEEPING, Training
from harness.efficiency.overhead_offload import VARIANTS, OffloadBench, VariantRun, cost_of, variant_runs
from harness.efficiency.record import OutOfMemory
from harness.efficiency.serial import SerialHost
from harness.errors import UserError
from harness.measuring.gpu import NoGpuError
from harness.measuring.meters import Meters
from harness.step.spec import Shape
from house import ROOT

from grass.host import current

CODE = f"""
import sys
from harness.__main__ import main
from harness.efficiency import overhead_host
from harness.step.spec import Geometry
overhead_host.GEOMETRY = Geometry.model_validate_json({TINY.model_dump_json()!r})
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], OverheadRecord]:
    """Lines and record of the command, with a small model on the host, on a machine that can do no more than measure.

    In a process of its own also because it changes how memory is freed.
    """
    folder = tmp_path_factory.mktemp("overhead")
    words = ["efficiency", "--overhead", "--device", "cpu", "--config", str(data.tiny_file(folder))]
    words += ["--steps", "10", "--repeats", "2", "--warmup", "0", "--out", str(folder / "out")]
    environment = without(modules_beside(("torch", "transformers", "peft", "pydantic", "PyYAML")), folder)
    done = subprocess.run(
        [sys.executable, "-c", CODE, *words], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "out" / "overhead").glob("cpu--*.json")
    lines = done.stdout.splitlines()
    assert lines[-1] == f"all of it, units in the keys: {path}"
    return lines, OverheadRecord.model_validate_json(path.read_bytes())


@pytest.fixture
def meters() -> Meters:
    return Meters("cpu")


# ---------------------------------------------------------------- as a whole


def test_it_prints_a_ratio_for_every_situation_beside_the_targets(ran: tuple[list[str], OverheadRecord]) -> None:
    lines, _ = ran
    for active, clip in itertools.product((4, 2), ("off", "on")):
        (line,) = [a for a in lines if f"step, {active} of 4 layers, clipping {clip}, freed memory as found" in a]
        assert "over AdamW foreach=False" in line
    for words in ("target: at most 1.10 of each", "importance / uniform", "a batch of a probe / "):
        assert sum(words in line for line in lines) == 1
    (line,) = [line for line in lines if "bookkeeping, share of a step of 256 tokens" in line]
    assert line.endswith("; target 1%")
    assert "  a rehearsal on a CPU, which shows that it runs and nothing of a GPU" in lines
    for active, variant in itertools.product((2, 4), VARIANTS):
        (line,) = [line for line in lines if line.startswith(f"  {active} layers, {variant}: ")]
        assert ("speed / resident" in line) == (variant != "resident")


def test_the_record_of_the_host_part_has_every_number(ran: tuple[list[str], OverheadRecord]) -> None:
    host = ran[1].host
    assert len(host.steps) in (4, 8)  # 8 where the C library can be told to keep freed memory
    for row in host.steps:
        assert row.grass_step_s.median > 0
        assert row.grass_step_s.count == 10
        assert set(row.grass_over_adamw_ratio) == {"foreach=False", "default", "fused"}
    book = host.bookkeeping
    assert set(book.period_s) == {"importance", "uniform", "probe"}
    assert book.bookkeeping_share.count == 2
    assert 0 < book.bookkeeping_share.least < 1
    # every method was called in every period
    assert all(share.least > 0 for share in book.method_share.values())
    assert sum(share.median for share in book.method_share.values()) == pytest.approx(book.bookkeeping_share.median)


def test_the_record_of_the_offload_part_has_every_number(ran: tuple[list[str], OverheadRecord]) -> None:
    offload = ran[1].offload
    assert (offload.rehearsal, offload.model, offload.settings) == (True, "tiny", "lean")
    assert [(a.active_layers, a.variant) for a in offload.variants] == list(itertools.product((2, 4), VARIANTS))
    for of in offload.variants:
        assert of.not_measured == ()
        assert of.memory is not None
        assert [block.repeat for block in of.timing] == [0, 1]
        for block in of.timing:
            assert block.timed_steps == 10
            assert block.offload_mode == ("resident" if of.variant == "resident" else "move")
            assert bool(block.moved_bytes_per_step) == (of.variant != "resident")
        assert of.speed_over_resident_ratio is not None
        assert of.speed_over_resident_ratio.count == 2
        assert of.step_speed_over_resident_ratio is not None
        assert of.step_speed_over_resident_ratio.count == 20


def test_all_variants_train_the_same_layers(ran: tuple[list[str], OverheadRecord]) -> None:
    variants = ran[1].offload.variants[: len(VARIANTS)]
    draws = [[block.draws for block in of.timing] for of in variants]
    assert all(of == draws[0] for of in draws)
    assert len({draw for block in draws[0] for draw in block}) > 1


def test_the_record_says_where_it_comes_from(ran: tuple[list[str], OverheadRecord]) -> None:
    record = ran[1]
    assert record.provenance.packages["torch"] == torch.__version__
    assert set(record.provenance.input_sha256) == {"study"}
    assert (record.device.kind, record.device.threads) == ("cpu", 1)


def test_without_a_gpu_it_says_what_can_be_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def none(device: str) -> Any:
        raise NoGpuError("no GPU was found")

    monkeypatch.setattr("harness.measuring.gpu.lease_for", none)
    words = ["efficiency", "--overhead", "--config", str(ROOT / "config" / "efficiency.yaml"), "--out", str(tmp_path)]
    assert main(words) == 2
    assert capsys.readouterr().err.endswith("no GPU was found; or rehearse on the tiny model (--device cpu)\n")


# ---------------------------------------------------------------- by turns


def test_contenders_take_turns_and_the_order_turns_round() -> None:
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = interleaved(contenders, warmup=1, rounds=2)
    assert calls == list("abccbaabc")
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_the_spread_of_known_values() -> None:
    one = Spread.of([3.0])
    assert (one.least, one.low_quartile, one.median, one.high_quartile, one.most, one.count) == (3, 3, 3, 3, 3, 1)
    many = Spread.of([float(n) for n in range(101)])
    assert many.text(".0f") == "50 (25 to 75)"
    assert (many.least, many.most, many.count) == (0, 100, 101)
    assert ratios([2, 6], [1, 2]) == [2, 3]


def test_calls_are_timed_only_inside_the_block() -> None:
    class Owner:
        def double(self, number: int) -> int:
            return 2 * number

    owner = Owner()
    with timed_calls(owner, ["double"]) as seconds:
        assert owner.double(3) == 6
        taken = seconds["double"]
        assert taken > 0
    assert owner.double(4) == 8
    assert seconds["double"] == taken
    assert not vars(owner)
    with pytest.raises(AttributeError, match="halve"), timed_calls(owner, ["double", "halve"]):
        pass
    assert not vars(owner)


def test_both_samplers_of_the_bookkeeping_train_the_same_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead_host, "GEOMETRY", TINY)
    monkeypatch.setattr(overhead_host, "SHAPE", Shape(batch=1, length=8))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="GRASS is near uniform")
        mine, plain = Training("importance"), Training("uniform")
    for _ in range(11):
        mine.step()
        plain.step()
    optimizers: list[Any] = [training.run.method.optimizer for training in (mine, plain)]
    sets = [[record.active for record in opt.history] for opt in optimizers]
    assert sets[0] == sets[1] == [(0, 2)] * 5 + [(1, 3)] * 5 + [(0, 2)]
    assert set(optimizers[0].importance.measured_at) == {5, 10}
    # a draw by chance costs time too, and falls in the last step of a period
    drawn = [step["_resample"] > 0 for step in mine.inside]
    assert drawn == [number % 5 == 4 for number in range(11)]
    assert all(name not in vars(optimizers[0]) for name in BOOKKEEPING)


# ---------------------------------------------------------------- what moving states costs


CHOSEN = data.study().overhead
assert CHOSEN is not None


@pytest.fixture
def runs() -> list[VariantRun]:
    """The variants with two active layers, as on a GPU."""
    return variant_runs(data.study(), CHOSEN, "cuda", 2)


Answer = Callable[[Job], Reply]


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], list[str]]:
    """Lets a function answer instead of `execute`; the list it returns tells what was asked, and of which variant."""

    def answer_by(answer: Answer) -> list[str]:
        asked: list[str] = []

        def execute(job: Job, meters: Meters) -> Reply:
            kind = "serial" if isinstance(current(), SerialHost) else job.cell.options["offload"]
            asked.append(f"{kind} {job.do}" + (f" {job.repeat}" if job.do == "timing" else ""))
            return answer(job)

        monkeypatch.setattr(overhead_offload, "execute", execute)
        return asked

    return answer_by


def measured(job: Job) -> Reply:
    """Everything goes well."""
    if job.do == "memory":
        return Reply(status="ok", memory=data.memory_block(14.5))
    return Reply(status="ok", timing=data.timing_block(job.repeat, 1000.0, draws=True))


def bench(meters: Meters, budget: Budget | None = None) -> OffloadBench:
    return OffloadBench(CHOSEN, meters, data.ASKED, budget or Budget(None))


def test_peaks_come_first_and_variants_take_turns(
    meters: Meters, runs: list[VariantRun], answered: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = answered(measured)
    usual = current()
    part = bench(meters).measure([runs], data.device_record())
    assert current() is usual
    assert asked[:3] == [f"{variant} memory" for variant in VARIANTS]
    assert asked[3:9] == [f"{variant} timing {n}" for n in (0, 1) for variant in VARIANTS[:: -1 if n else 1]]
    assert (part.rehearsal, part.model, part.shape) == (False, "llama-2-7b", Shape(batch=4, length=1024))
    said = capsys.readouterr().out.splitlines()
    assert "move / resident at least 0.98 with at most 14.7 GiB allocated; this run: 1.0000, 14.500 GiB" in said[-1]


def test_the_cell_is_the_studys_own(runs: list[VariantRun]) -> None:
    own = data.entry("llama-2-7b", "grass-decoder", "lean", "4x1024").cell
    assert [run.entry.cell.options["offload"] for run in runs] == ["resident", "move", "move"]
    assert runs[1].entry.cell.model_copy(update={"options": own.options}) == own
    assert all(run.entry.cell.options["active_layers"] == 2 for run in runs)


def test_a_method_without_states_to_move_is_refused() -> None:
    lora = CHOSEN.model_copy(update={"method": "lora"})
    with pytest.raises(UserError, match="the method lora has no option active_layers"):
        variant_runs(data.study(), lora, "cuda", 2)


def test_a_block_that_would_not_end_in_time_is_not_begun(
    meters: Meters, runs: list[VariantRun], answered: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = answered(measured)
    part = bench(meters, Budget(1.0)).measure([runs], data.device_record())
    assert asked == []
    assert part.variants[1].not_measured[0] == "memory: the budget was used up"
    assert len(part.variants[1].not_measured) == 1 + data.ASKED.repeats
    assert part.variants[1].ratio_why == "no repeat was timed beside resident"
    assert "  2 layers, move, memory: not measured (the budget was used up)" in capsys.readouterr().out.splitlines()


def test_a_variant_without_enough_memory_is_a_line_with_its_reason(
    meters: Meters, runs: list[VariantRun], answered: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def resident_does_not_fit(job: Job) -> Reply:
        if job.cell.options["offload"] == "resident":
            oom = OutOfMemory(block="memory", phase="update", requested_bytes=2**30)
            return Reply(status="oom", why="in phase update: CUDA out of memory.", oom=oom)
        return measured(job)

    asked = answered(resident_does_not_fit)
    part = bench(meters).measure([runs], data.device_record())
    assert [what for what in asked if what.startswith("resident")] == ["resident memory"]
    resident, move, _ = part.variants
    assert resident.not_measured == ("memory: out of memory in phase update: CUDA out of memory.",)
    assert (
        "2 layers, resident: no ratio: no repeat was timed beside resident; not measured: memory: out of memory in"
        in (capsys.readouterr().out)
    )
    # there is a speed, but no ratio
    assert len(move.timing) == data.ASKED.repeats
    assert move.speed_over_resident_ratio is None


def test_nothing_is_measured_on_a_device_that_was_not_left_clean(
    meters: Meters, runs: list[VariantRun], answered: Any
) -> None:
    asked = answered(lambda job: measured(job).model_copy(update={"clean": False}))
    part = bench(meters).measure([runs], data.device_record())
    assert asked == ["resident memory"]
    assert part.variants[0].memory is not None
    (why,) = {line.partition(": ")[2] for of in part.variants for line in of.not_measured}
    assert why == "2 layers, resident, memory left memory behind on the device"


def test_figures_that_are_void_say_why(meters: Meters, runs: list[VariantRun], answered: Any) -> None:
    answered(lambda job: Reply(status="ok", why="void: process 7 was on the GPU"))
    part = bench(meters).measure([runs], data.device_record())
    assert part.variants[0].not_measured[0] == "memory: void: process 7 was on the GPU"
    assert part.variants[0].memory is None


def test_speeds_are_compared_within_a_repeat(runs: list[VariantRun]) -> None:
    resident, move, _ = runs
    resident.timing += [data.timing_block(0, 1000.0), data.timing_block(1, 100.0)]
    # in the reverse order, and with a repeat that has no counterpart
    move.timing += [data.timing_block(1, 100.0), data.timing_block(0, 500.0), data.timing_block(2, 7.0)]
    cost = cost_of(move, beside=resident)
    assert [block.repeat for block in cost.timing] == [0, 1, 2]
    by_repeat, by_step = cost.speed_over_resident_ratio, cost.step_speed_over_resident_ratio
    assert by_repeat is not None
    assert (by_repeat.least, by_repeat.most, by_repeat.count) == (0.5, 1.0, 2)
    assert by_step is not None
    assert by_step.count == 20
    assert (by_step.least, by_step.most) == (pytest.approx(0.5), pytest.approx(1.0))
    alone = cost_of(resident, beside=resident)
    assert alone.speed_over_resident_ratio is not None
    assert alone.speed_over_resident_ratio.median == 1.0


def test_copies_are_serial_only_for_that_variant(runs: list[VariantRun]) -> None:
    usual, device = current(), torch.device("cuda")
    for run in runs:
        with run.copies():
            assert isinstance(current(), SerialHost) == (run.variant == "serial")
            if run.variant == "serial":
                assert current().allocated_bytes(device) is None
        assert current() is usual
