"""Which rows a step sees, and the learning-rate schedule."""

from __future__ import annotations

from typing import Any

import pytest
from harness.inputs.tokens import Encoded
from harness.training.batches import Batches, CalibrationBatches, RowOrder
from harness.training.schedule import lr_factor
from hypothesis import given
from hypothesis import strategies as st

from baselines.method import Recipe


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
