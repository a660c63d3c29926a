"""Counting live tensors and fingerprinting weights."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from harness.measuring import census
from harness.measuring.census import begin_census, fingerprint, live_bytes_outside, state_bytes, storage_bytes
from hypothesis import given
from hypothesis import strategies as st
from quick_runs import UNFREEZE
from torch import nn

from grass.adamw import AdamW


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


def test_what_died_after_a_census_is_freed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that refers to itself, of an earlier run, which the first census had hidden from the collector."""
    monkeypatch.setattr(gc, "unfreeze", UNFREEZE)
    model = small_model()
    model.itself = [model]  # type: ignore[assignment]
    alive = weakref.ref(model)
    begin_census()
    del model
    gc.collect()
    assert alive() is not None
    begin_census()
    assert alive() is None


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


def test_a_fingerprint_reads_views_that_begin_anywhere_and_numbers_of_any_size() -> None:
    base = torch.arange(41, dtype=torch.int16).view(torch.bfloat16)
    for start in range(5):
        assert fingerprint([base[start:]]) == fingerprint([base[start:].clone()])
    for dtype in (torch.uint8, torch.bool, torch.float64, torch.complex64, torch.complex128):
        ones = torch.ones(3, dtype=dtype)
        assert fingerprint([ones]) != fingerprint([torch.zeros(3, dtype=dtype)])
    assert fingerprint([torch.ones(())]) != fingerprint([torch.zeros(())])
    assert fingerprint([]) == ()


def test_a_tensor_around_others_is_counted_and_read_by_what_it_holds() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    def pair(first: float, second: float) -> torch.Tensor:
        wrapped: torch.Tensor = TwoTensor(torch.full((10,), first), torch.full((10,), second))
        return wrapped

    assert sum(storage_bytes([pair(1.0, 1.0)]).values()) == 80
    assert fingerprint([pair(1.0, 1.0)]) != fingerprint([pair(1.0, 2.0)])
    assert fingerprint([pair(1.0, 2.0)]) == fingerprint([pair(1.0, 2.0)])


def test_an_optimizers_state_is_counted_in_lists_and_objects_and_a_storage_once() -> None:
    class Projector:
        def __init__(self) -> None:
            self.matrix, self.rank = torch.ones(5), 3

    model = nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    flat = torch.ones(100)
    state = {"projector": Projector(), "pairs": [torch.ones(3), (torch.ones(2),)], "a": flat[:50], "b": flat[50:]}
    optimizer.state[model.weight] = state
    assert state_bytes(optimizer, counts=lambda _: True) == 4 * (5 + 3 + 2 + 100)
    assert state_bytes(None, counts=lambda _: True) == 0
