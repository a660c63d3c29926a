"""What the harness measures itself: live tensors, fingerprints, memory peaks, row order, schedule, and the verdict."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations, permutations
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from harness.inputs.tokens import Encoded
from harness.measuring import census, meters
from harness.measuring.census import begin_census, fingerprint, live_bytes_outside
from harness.measuring.meters import HostMeter, MemoryMeters, NvmlMeter, TorchMeter
from harness.training.batches import Batches, CalibrationBatches, RowOrder
from harness.training.engagement import CHANCE_LIMIT, Period, chance_of_set, verdict
from harness.training.schedule import lr_factor
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from baselines.method import Expectation, ModelFacts, Recipe
from grass.adamw import AdamW

MIB = 2**20


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---------------------------------------------------------------- census


def small_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))


def trained_once(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(3, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def test_the_census_counts_exactly_the_bytes_of_adams_moments() -> None:
    model = small_model()
    begin_census()
    assert live_bytes_outside(model) == 0
    optimizer = AdamW(model.parameters(), lr=0.1)
    trained_once(model, optimizer)
    parameters = sum(p.numel() for p in model.parameters())
    assert live_bytes_outside(model) == 8 * parameters
    optimizer.state.clear()
    assert live_bytes_outside(model) == 0


def test_the_census_counts_moments_in_bf16_at_half() -> None:
    model = small_model().to(torch.bfloat16)
    begin_census()
    optimizer = AdamW(model.parameters(), lr=0.1, state_dtype=torch.bfloat16)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    assert live_bytes_outside(model) == 4 * sum(p.numel() for p in model.parameters())


def test_a_gradient_left_alive_is_counted_even_if_python_never_saw_it() -> None:
    model = nn.Linear(6, 5, bias=False)
    begin_census()
    model(torch.ones(3, 6)).sum().backward()
    assert live_bytes_outside(model) == 4 * 6 * 5
    model.weight.grad = None
    assert live_bytes_outside(model) == 0


def test_the_census_ignores_the_model_and_what_was_alive_before() -> None:
    old = torch.ones(1000)
    model = small_model()
    begin_census()
    model.register_buffer("table", torch.ones(500))
    model.append(nn.Linear(4, 4))
    assert live_bytes_outside(model) == 0
    new = torch.ones(10)
    assert live_bytes_outside(model) == 40
    assert old.numel() + new.numel() == 1010


def test_the_census_counts_a_storage_once_and_whole() -> None:
    model = small_model()
    begin_census()
    base = torch.ones(100)
    views = [base[:10], base.view(10, 10), base.t() if base.dim() == 2 else base[5:]]
    assert live_bytes_outside(model) == 400
    part = base[:1]
    del base, views
    # a view of one entry keeps all hundred alive
    assert live_bytes_outside(model) == 400
    assert part.numel() == 1


def test_the_census_sees_what_hides_in_containers_and_closures() -> None:
    model = small_model()
    begin_census()

    def keeper() -> Callable[[], torch.Tensor]:
        hidden = torch.ones(25)
        return lambda: hidden

    held = [keeper(), {"deep": ({"deeper": torch.ones(25)},)}]
    assert live_bytes_outside(model) == 200
    assert len(held) == 2


# ---------------------------------------------------------------- fingerprint

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


@given(
    dtype=st.sampled_from(sorted(BITS, key=str)),
    values=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40),
    data=st.data(),
)
def test_one_flipped_bit_changes_the_fingerprint(dtype: torch.dtype, values: list[int], data: st.DataObject) -> None:
    integer = BITS[dtype]
    width = torch.iinfo(integer).bits
    before = torch.tensor(values, dtype=torch.int64).to(integer)
    place = data.draw(st.integers(0, len(values) - 1))
    bit = data.draw(st.integers(0, width - 1))
    after = before.clone()
    flip = 1 << bit if bit < width - 1 else torch.iinfo(integer).min
    after[place] ^= flip
    # any bits at all, so NaNs and -0.0 against 0.0 are among them
    assert fingerprint([before.view(dtype)]) != fingerprint([after.view(dtype)])
    assert fingerprint([before.view(dtype)]) == fingerprint([before.view(dtype).clone()])


def test_a_fingerprint_knows_places_not_only_values() -> None:
    assert fingerprint([torch.tensor([1.0, 2.0])]) != fingerprint([torch.tensor([2.0, 1.0])])
    one, other = torch.tensor([1.0]), torch.tensor([2.0])
    assert fingerprint([one, other]) != fingerprint([other, one])


def test_a_fingerprint_does_not_depend_on_memory_layout_or_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    whole = fingerprint([tensor])
    assert fingerprint([tensor.t().contiguous().t()]) == whole
    monkeypatch.setattr(census, "_CHUNK", 10)
    assert fingerprint([tensor]) == whole


# ---------------------------------------------------------------- memory meters


def test_a_host_peak_is_that_of_its_own_phase() -> None:
    meter = HostMeter()
    if meter.why is not None:
        pytest.skip(meter.why)
    size = 64 * MIB
    meter.restart()
    before = meter.peak_bytes()
    block = b"x" * size
    assert len(block) == size
    del block
    during = meter.peak_bytes()
    meter.restart()
    after = meter.peak_bytes()
    assert before is not None
    assert during is not None
    assert after is not None
    # a page or two may go back to the system meanwhile
    assert during - before >= size - MIB
    assert abs(after - before) < 8 * MIB


def test_a_phase_keeps_its_own_peak_and_the_higher_of_two_visits() -> None:
    meters = MemoryMeters("cpu")
    if HostMeter().why is not None:
        pytest.skip(str(HostMeter().why))
    with meters.phase("small"):
        pass
    with meters.phase("large"):
        block = b"x" * (64 * MIB)
        assert block
        del block
    with meters.phase("small"):
        pass
    with meters.phase("large"):
        pass
    peaks = meters.record(state_peak_bytes=None).host_peak_bytes
    assert peaks["large"] is not None
    assert peaks["small"] is not None
    assert peaks["large"] - peaks["small"] >= 60 * MIB


def test_a_phase_that_fails_is_measured_too() -> None:
    meters = MemoryMeters("cpu")
    with pytest.raises(MemoryError), meters.phase("load"):
        raise MemoryError
    assert "load" in meters.record(state_peak_bytes=None).host_peak_bytes


def test_without_a_writable_proc_the_host_peak_is_null_with_a_reason(tmp_path: Path) -> None:
    gone = HostMeter(tmp_path / "nowhere")
    assert gone.peak_bytes() is None
    assert gone.why == "the kernel's high-water mark cannot be reset here (FileNotFoundError)"
    gone.restart()

    # a kernel without the high-water mark
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t100 kB\n")
    without = HostMeter(tmp_path)
    assert without.peak_bytes() is None
    assert without.why == "the kernel's high-water mark cannot be reset here (LookupError)"

    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t  2048 kB\n")
    sound = HostMeter(tmp_path)
    assert (sound.why, sound.peak_bytes()) == (None, 2 * MIB)
    assert (tmp_path / "clear_refs").read_text() == "5"


def test_on_the_cpu_every_device_figure_is_null_with_a_reason() -> None:
    meters = MemoryMeters("cpu")
    with meters.phase("steady"):
        pass
    record = meters.record(state_peak_bytes=12)
    assert record.device_allocated_peak_bytes == {"steady": None}
    assert record.device_reserved_peak_bytes == {"steady": None}
    assert record.device_why == "the run was on the CPU"
    assert (record.nvml_process_peak_bytes, record.nvml_device_peak_bytes) == (None, None)
    assert record.nvml_why == "the run was on the CPU"
    assert record.state_peak_bytes == 12
    assert TorchMeter("allocated", "cpu").peak_bytes() is None


class FakeNvml(ModuleType):
    """The five calls of NVML that the meter makes, answering from lists; the last answer repeats."""

    def __init__(self, *, device: list[int], process: list[int | None], pid: int | None = None) -> None:
        super().__init__("pynvml")
        self.device, self.process = device, process
        self.pid = os.getpid() if pid is None else pid
        self.asked: list[Any] = []

    def nvmlInit(self) -> None:  # noqa: N802
        pass

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        self.asked.append(index)
        return "handle"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        self.asked.append(uuid)
        return "handle"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:  # noqa: N802
        return SimpleNamespace(used=self.device.pop(0) if len(self.device) > 1 else self.device[0])

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:  # noqa: N802
        used = self.process.pop(0) if len(self.process) > 1 else self.process[0]
        return [SimpleNamespace(pid=1, usedGpuMemory=999), SimpleNamespace(pid=self.pid, usedGpuMemory=used)]


def nvml_meter(fake: FakeNvml, *, samples: int = 0) -> NvmlMeter:
    meter = NvmlMeter("cuda", fake)
    meter.close()
    for _ in range(samples):
        meter.sample()
    return meter


def test_nvml_finds_this_process_among_others_and_keeps_the_highest_of_two_samples() -> None:
    rising = nvml_meter(FakeNvml(device=[500, 700], process=[300, 400]), samples=1)
    falling = nvml_meter(FakeNvml(device=[700, 500], process=[400, 300]), samples=1)
    for meter in (rising, falling):
        assert (meter.why, meter.process_peak_bytes, meter.device_peak_bytes) == (None, 400, 700)


def test_nvml_keeps_sampling_until_it_is_closed() -> None:
    fake = FakeNvml(device=[1, 2, 3, 4], process=[10, 20, 30, 40])
    meter = NvmlMeter("cuda", fake)
    deadline = time.monotonic() + 10
    while meter.device_peak_bytes != 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    meter.close()
    assert (meter.device_peak_bytes, meter.process_peak_bytes) == (4, 40)
    meter._thread.join(timeout=10)
    assert not meter._thread.is_alive()


def test_a_process_that_nvml_does_not_list_is_null_with_a_reason_and_the_device_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for fake in (FakeNvml(device=[500], process=[300], pid=424242), FakeNvml(device=[500], process=[None])):
        meter = nvml_meter(fake)
        assert (meter.process_peak_bytes, meter.device_peak_bytes) == (None, 500)
        meters = MemoryMeters("cpu")
        monkeypatch.setattr(meters, "_nvml", meter)
        record = meters.record(state_peak_bytes=None)
        assert record.nvml_process_peak_bytes is None
        assert record.nvml_device_peak_bytes == 500
        assert record.nvml_why == "NVML lists no process with this id (a container?): device memory only"


def test_an_nvml_that_does_not_start_is_a_reason_and_no_error() -> None:
    fake = FakeNvml(device=[500], process=[300])

    def fails() -> None:
        raise RuntimeError("Driver Not Loaded")

    fake.nvmlInit = fails  # type: ignore[method-assign]
    meter = NvmlMeter("cuda", fake)
    assert meter.why == "NVML: Driver Not Loaded"
    assert (meter.process_peak_bytes, meter.device_peak_bytes) == (None, None)
    meter.close()


@pytest.mark.parametrize(
    ("visible", "asked"), [(None, 0), ("", 0), ("3", 3), ("2,0", 2), ("GPU-abc,GPU-def", "GPU-abc")]
)
def test_nvml_looks_at_the_device_that_torch_sees_first(
    visible: str | None, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    fake = FakeNvml(device=[1], process=[1])
    nvml_meter(fake)
    assert fake.asked == [asked]


# ---------------------------------------------------------------- row order


def rows(count: int) -> list[Encoded]:
    """Row i is the token i, twice."""
    return [Encoded([i, i], [-100, i], truncated=False) for i in range(count)]


def batches(count: int = 13, *, size: int = 4, micro: int = 4, seed: int = 0) -> Batches:
    return Batches(rows(count), batch_size=size, micro_batch_size=micro, seed=seed, pad_id=0, device="cpu")


def seen(given: Batches, step: int) -> list[int]:
    return [int(row[0]) for batch in given.step(step) for row in batch["input_ids"]]


def test_every_method_sees_the_same_rows_whatever_its_micro_batches() -> None:
    for step in range(8):
        assert seen(batches(micro=4), step) == seen(batches(micro=2), step) == seen(batches(micro=1), step)
    assert [len(b["input_ids"]) for b in batches(micro=2).step(0)] == [2, 2]


def test_a_step_may_be_asked_for_at_any_time() -> None:
    order = batches()
    later = seen(order, 9)
    seen(order, 2)
    assert seen(order, 9) == later == seen(batches(), 9)


@given(count=st.integers(1, 30), size=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_every_row_comes_once_an_epoch_even_where_batches_straddle_it(count: int, size: int, seed: int) -> None:
    order = RowOrder(count, seed)
    steps = -(-3 * count // size)
    places = [row for step in range(steps) for row in order.rows(step * size, size)]
    for epoch in range(3):
        assert sorted(places[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    order = RowOrder(50, 0)
    assert order.rows(0, 50) != order.rows(50, 50)
    assert order.rows(0, 50) != RowOrder(50, 1).rows(0, 50)
    assert order.rows(0, 50) != list(range(50))


def test_calibration_has_an_order_of_its_own_and_takes_nothing_from_training() -> None:
    plain, probed = batches(50), batches(50)
    calibration = CalibrationBatches(probed)
    drawn = [[int(row[0]) for row in batch["input_ids"]] for batch in calibration.batches(5)]
    again = [[int(row[0]) for row in batch["input_ids"]] for batch in calibration.batches(5)]
    assert drawn == again
    flat = [row for batch in drawn for row in batch]
    assert len(set(flat)) == 20
    assert flat != [row for step in range(5) for row in seen(plain, step)]
    assert all(seen(plain, step) == seen(probed, step) for step in range(20))


# ---------------------------------------------------------------- schedule


def recipe(**changes: Any) -> Recipe:
    given = {"steps": 100, "batch_size": 4, "micro_batch_size": 4, "max_length": 8, "loss_on": "all"}
    return Recipe(**{**given, "warmup_steps": 10, "max_grad_norm": None, **changes})  # type: ignore[arg-type]


@given(
    steps=st.integers(1, 3000),
    share=st.floats(0, 0.99),
    schedule=st.sampled_from(("linear", "cosine", "constant")),
)
def test_the_schedule_rises_to_one_then_falls_and_is_never_zero(steps: int, share: float, schedule: str) -> None:
    warmup = min(int(share * steps), steps - 1)
    made = recipe(steps=steps, warmup_steps=warmup, schedule=schedule)
    factors = [lr_factor(step, made) for step in range(steps)]
    assert all(0 < f <= 1 for f in factors)
    assert factors[warmup] == 1
    assert factors[:warmup] == sorted(factors[:warmup])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)


def test_the_schedules_by_hand() -> None:
    assert [lr_factor(s, recipe(warmup_steps=4)) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert lr_factor(55, recipe()) == pytest.approx(0.5)
    assert lr_factor(99, recipe()) == pytest.approx(1 / 90)
    cosine = recipe(schedule="cosine")
    assert lr_factor(55, cosine) == pytest.approx(0.5)
    assert lr_factor(10 + 30, cosine) == pytest.approx(0.75)
    assert [lr_factor(s, recipe(schedule="constant")) for s in (10, 50, 99)] == [1, 1, 1]
    assert lr_factor(0, recipe(warmup_steps=0)) == 1


# ---------------------------------------------------------------- chance of a set


def brute_force(probability: list[float], drawn: tuple[int, ...]) -> float:
    total = 0.0
    for order in permutations(range(len(probability)), len(drawn)):
        if set(order) == set(drawn):
            chance, left = 1.0, sum(probability)
            for layer in order:
                chance, left = chance * probability[layer] / left, left - probability[layer]
            total += chance
    return total


@given(
    weights=st.lists(st.floats(0.01, 1), min_size=2, max_size=6),
    data=st.data(),
)
def test_the_chance_of_a_set_is_that_of_all_its_orders(weights: list[float], data: st.DataObject) -> None:
    p = [w / math.fsum(weights) for w in weights]
    count = data.draw(st.integers(1, len(p)))
    chances = {drawn: chance_of_set(p, drawn) for drawn in combinations(range(len(p)), count)}
    assert math.fsum(chances.values()) == pytest.approx(1)
    drawn = data.draw(st.sampled_from(sorted(chances)))
    assert chances[drawn] == pytest.approx(brute_force(p, drawn))
    assert chance_of_set(p, drawn[::-1]) == pytest.approx(chances[drawn])


def test_above_six_layers_the_chance_is_an_upper_bound() -> None:
    p = [w / 39 for w in (10, 8, 6, 5, 4, 3, 2, 1)]
    for drawn in combinations(range(8), 7):
        exact = brute_force(p, drawn)
        assert exact <= chance_of_set(p, drawn) <= 1


def test_a_set_with_a_layer_that_cannot_be_drawn_has_no_chance() -> None:
    assert chance_of_set([0.5, 0.5, 0.0], (0, 2)) == 0
    assert chance_of_set([1.0, 0.0], (0,)) == 1


# ---------------------------------------------------------------- verdict

FACTS = ModelFacts(
    architecture="Made",
    layer_parameters=(10_000,) * 4,
    embedding_parameters=5_000,
    head_parameters=3_000,
    final_norm_parameters=10,
    hidden_size=10,
    tied_embeddings=False,
)
OUTSIDE = 8_010
SAMPLED = Expectation(
    layers="sampled",
    active_layers=2,
    period_steps=3,
    embedding=True,
    head=True,
    final_norm=True,
    trainable_parameters=20_000 + OUTSIDE,
    state_bytes_per_parameter=8,
    state_of="visited",
)
FULL = Expectation(
    layers="all",
    embedding=True,
    head=True,
    final_norm=True,
    trainable_parameters=FACTS.total_parameters,
    state_bytes_per_parameter=8,
    state_of="active",
)
ADAPTERS = Expectation(
    layers="all", base_frozen=True, trainable_parameters=6_000, state_bytes_per_parameter=8, state_of="active"
)
NOTHING = Expectation(layers="none", trainable_parameters=0, state_bytes_per_parameter=0, state_of="none")
GROUPS = ["embedding", "final_norm", "head"]


def sampled_periods(*sets: list[int]) -> list[Period]:
    """Periods of a sound layer-wise method that keeps the state of sleepers."""
    periods, visited = [], set()
    for number, layers in enumerate(sets):
        visited |= set(layers)
        periods.append(
            Period(
                first_step=3 * number,
                last_step=3 * number + 2,
                moved_layers=list(layers),
                moved_base=list(layers),
                moved_groups=list(GROUPS),
                graded_layers=list(layers),
                graded_groups=list(GROUPS),
                graded_parameters=SAMPLED.trainable_parameters,
                state_bytes=8 * (OUTSIDE + 10_000 * len(visited)),
                believed_active=list(layers),
                believed_probability=[0.25] * 4,
            )
        )
    return periods


SOUND = sampled_periods([0, 1], [1, 3], [0, 2])


def full_periods() -> list[Period]:
    every = [0, 1, 2, 3]
    return [
        replace(p, moved_layers=every, moved_base=every, graded_layers=every, believed_active=None,
                graded_parameters=FULL.trainable_parameters, state_bytes=8 * FULL.trainable_parameters)
        for p in sampled_periods([0], [0])
    ]  # fmt: skip


def adapter_periods() -> list[Period]:
    return [
        replace(p, moved_base=[], moved_groups=[], graded_groups=[], graded_parameters=6_000, state_bytes=48_000)
        for p in full_periods()
    ]


def broken(promise: Expectation, periods: list[Period], **options: Any) -> list[str]:
    """Names of the checks that fail."""
    return [check.name for check in verdict(promise, FACTS, periods, **options) if not check.ok]


LAYERS, GROUPS_MOVED = "layers that moved", "groups outside the layers that moved"
GRADIENTS, TRAINABLE = "gradients exist for what moves, and for nothing else", "trainable parameters in one step"
STATE, BELIEF = "live optimizer-state bytes", "layers that moved are those the method says"
ROTATION, FROZEN = "the active set rotates", "base weights frozen"


def test_sound_runs_pass_every_check() -> None:
    assert broken(SAMPLED, SOUND) == []
    assert broken(FULL, full_periods()) == []
    assert broken(ADAPTERS, adapter_periods()) == []
    assert broken(NOTHING, []) == []
    names = [check.name for check in verdict(SAMPLED, FACTS, SOUND)]
    assert names == [LAYERS, GROUPS_MOVED, GRADIENTS, TRAINABLE, STATE, BELIEF, ROTATION]


@pytest.mark.parametrize(
    ("wrong", "failing"),
    [
        # a layer too many trained, honestly told
        (
            {"moved_layers": [0, 1, 2], "graded_layers": [0, 1, 2], "believed_active": [0, 1, 2]},
            [LAYERS],
        ),
        # nothing trained at all, as with an optimizer built from frozen parameters
        (
            {"moved_layers": [], "graded_layers": [], "believed_active": [], "state_bytes": 8 * (OUTSIDE + 30_000)},
            [LAYERS],
        ),
        ({"moved_groups": ["embedding", "final_norm"], "graded_groups": GROUPS}, [GROUPS_MOVED]),
        ({"moved_groups": [*GROUPS, "more"]}, [GROUPS_MOVED]),
        # a sleeping layer that still gets gradients
        ({"graded_layers": [0, 2, 3]}, [GRADIENTS]),
        ({"graded_layers": [2]}, [GRADIENTS]),
        ({"graded_groups": ["embedding"]}, [GRADIENTS]),
        ({"graded_parameters": SAMPLED.trainable_parameters + 1}, [TRAINABLE]),
        # state beyond what was visited, and state that is not there
        ({"state_bytes": 8 * (OUTSIDE + 50_000)}, [STATE]),
        ({"state_bytes": 8 * (OUTSIDE + 30_000)}, [STATE]),
        ({"state_bytes": 0}, [STATE]),
        # other layers than the method says
        ({"believed_active": [0, 3]}, [BELIEF]),
        ({"believed_active": None}, [BELIEF]),
    ],
)  # fmt: skip
def test_each_promise_of_a_layer_wise_method_is_held_by_a_check_of_its_own(
    wrong: dict[str, Any], failing: list[str]
) -> None:
    # the last of three periods is wrong: layers 0 and 2 moved, and all four have been visited
    assert broken(SAMPLED, [SOUND[0], SOUND[1], replace(SOUND[2], **wrong)]) == failing


def test_too_few_trained_parameters_are_as_wrong_as_too_many() -> None:
    fewer = [replace(p, graded_parameters=p.graded_parameters - 1) for p in SOUND]
    assert broken(SAMPLED, fewer) == [TRAINABLE]


def test_state_of_the_active_layers_only_must_be_let_go() -> None:
    promise = replace(SAMPLED, state_of="active")
    assert broken(promise, SOUND) == [STATE]
    assert broken(promise, [replace(p, state_bytes=8 * (OUTSIDE + 20_000)) for p in SOUND]) == []


def test_a_little_more_state_than_promised_is_no_offence() -> None:
    assert broken(SAMPLED, [replace(p, state_bytes=p.state_bytes + 32 * 1024) for p in SOUND]) == []
    assert broken(SAMPLED, [replace(p, state_bytes=p.state_bytes + 60 * 1024) for p in SOUND]) == [STATE]


def test_a_set_that_never_changes_is_caught_once_chance_cannot_explain_it() -> None:
    # a pair of four repeats by chance one time in six: nine repeats are below one in a million, seven are not
    assert broken(SAMPLED, sampled_periods(*[[0, 1]] * 8)) == []
    assert broken(SAMPLED, sampled_periods(*[[0, 1]] * 10)) == [ROTATION]
    assert (1 / 6) ** 9 < CHANCE_LIMIT < (1 / 6) ** 7
    # one change is enough to have drawn
    assert broken(SAMPLED, sampled_periods(*[[0, 1]] * 9, [1, 2])) == []


def test_a_set_that_the_method_makes_certain_may_stay() -> None:
    certain = [replace(p, believed_probability=[0.5, 0.499, 0.0005, 0.0005]) for p in sampled_periods(*[[0, 1]] * 10)]
    assert broken(SAMPLED, certain) == []


def test_all_layers_active_need_not_rotate() -> None:
    promise = replace(SAMPLED, active_layers=4, trainable_parameters=FACTS.total_parameters)
    periods = [replace(p, believed_active=[0, 1, 2, 3]) for p in full_periods() * 10]
    assert broken(promise, periods) == []


def test_base_weights_that_moved_under_adapters_are_caught() -> None:
    periods = adapter_periods()
    periods[1] = replace(periods[1], moved_base=[2])
    assert broken(ADAPTERS, periods) == [FROZEN]
    named = next(check for check in verdict(ADAPTERS, FACTS, periods) if check.name == FROZEN)
    assert named.observed == "moved: [2]"


def test_adapters_that_train_a_group_they_did_not_promise_are_caught() -> None:
    periods = [replace(p, moved_groups=["head"], graded_groups=["head"]) for p in adapter_periods()]
    assert broken(ADAPTERS, periods) == [GROUPS_MOVED, GRADIENTS]


def test_full_fine_tuning_that_leaves_a_layer_out_is_caught() -> None:
    periods = full_periods()
    periods[0] = replace(periods[0], moved_layers=[0, 1, 2], graded_layers=[0, 1, 2])
    assert broken(FULL, periods) == [LAYERS]


def test_a_run_without_a_finished_period_proves_nothing() -> None:
    for promise in (SAMPLED, FULL, ADAPTERS):
        assert LAYERS in broken(promise, [])


def test_a_method_that_promised_to_do_nothing_must_do_nothing() -> None:
    idle = replace(SOUND[0], moved_layers=[], moved_groups=[], state_bytes=0)
    assert broken(NOTHING, [idle]) == []
    assert broken(NOTHING, [replace(idle, moved_layers=[1])]) == [LAYERS]
    assert broken(NOTHING, [replace(idle, moved_groups=["head"])]) == [GROUPS_MOVED]
    assert broken(NOTHING, [replace(idle, state_bytes=100_000)]) == [STATE]


def test_a_final_norm_may_stand_still_in_bf16_only() -> None:
    still = [replace(p, moved_groups=["embedding", "head"]) for p in SOUND]
    assert broken(SAMPLED, still) == [GROUPS_MOVED]
    assert broken(SAMPLED, still, coarse_weights=True) == []
    others = [replace(p, moved_groups=["final_norm", "head"]) for p in SOUND]
    assert broken(SAMPLED, others, coarse_weights=True) == [GROUPS_MOVED]


def test_a_tied_head_is_promised_and_expected_nowhere() -> None:
    tied = replace(FACTS, head_parameters=0, tied_embeddings=True)
    periods = [
        replace(p, moved_groups=GROUPS[:2], graded_groups=GROUPS[:2], graded_parameters=25_010,
                state_bytes=p.state_bytes - 8 * 3_000)
        for p in SOUND
    ]  # fmt: skip
    checks = verdict(replace(SAMPLED, trainable_parameters=25_010), tied, periods)
    assert [check.name for check in checks if not check.ok] == []


def test_nvml_failing_in_mid_run_voids_the_peaks_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters, "POLL_S", 0.001)
    calls: list[int] = []

    def memory(_: object) -> object:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("GPU is lost")
        return SimpleNamespace(used=5)

    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda _: "device",
        nvmlDeviceGetMemoryInfo=memory,
        nvmlDeviceGetComputeRunningProcesses=lambda _: [],
    )
    meter = NvmlMeter("cuda", nvml)  # type: ignore[arg-type]
    meter._thread.join(timeout=10)
    assert meter.device_peak_bytes is None
    assert meter.why == "NVML failed during the run: GPU is lost"
