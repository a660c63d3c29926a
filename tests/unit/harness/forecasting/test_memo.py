"""What the memo makes again is what torch works out: shapes, memory, numbers of bytes; and what it must leave alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from forecast_cells import METHODS, small, small_forecast
from harness.forecasting import memo
from harness.forecasting.forecast import forecast
from harness.forecasting.memo import Memo
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Through(TorchDispatchMode):
    """Calls every operator through a memo."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self.memo = Memo(mode)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.memo(func, args, kwargs or {})


@pytest.fixture
def through() -> Iterator[Through]:
    with patch.dict(memo._ANSWERS, clear=True), FakeTensorMode() as mode, Through(mode) as entered:
        yield entered


def made_again(operator: str) -> bool:
    """Whether some answer of this operator can be made again."""
    found = [answer for key, answer in memo._ANSWERS.items() if str(key[0]) == operator]
    assert found, f"{operator} was not asked"
    return any(answer is not None for answer in found)


def looks(tensor: Tensor) -> tuple[Any, ...]:
    nbytes = tensor.untyped_storage().nbytes()
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device, nbytes


def test_the_second_answer_is_the_first_one_made_again(through: Through) -> None:
    x = torch.ones(4, 6)
    for act in (
        lambda: x @ x.t(),
        lambda: x[1:3, ::2],
        lambda: x.to(torch.bfloat16),
        lambda: aten._unsafe_view(x, [2, 12]),
        lambda: x.unbind(1)[3],
        lambda: x.max(dim=1).values,
    ):
        first, second = act(), act()
        assert looks(first) == looks(second)
        assert (first.untyped_storage()._cdata == x.untyped_storage()._cdata) == (
            second.untyped_storage()._cdata == x.untyped_storage()._cdata
        )
        assert type(second) is FakeTensor
    for operator in ("mm.default", "slice.Tensor", "_to_copy.default", "_unsafe_view.default", "unbind.int", "max.dim"):
        assert made_again(f"aten.{operator}")


def test_a_result_may_lack_some_of_its_tensors(through: Through) -> None:
    x, scale = torch.ones(2, 4), torch.ones(4)
    _, mean, deviation = aten.native_layer_norm(x, [4], scale, scale, 1e-5)
    for _ in range(2):
        found = aten.native_layer_norm_backward(x, x, [4], mean, deviation, scale, scale, [True, False, True])
        assert [one is None for one in found] == [False, True, False]
    assert made_again("aten.native_layer_norm_backward.default")


def test_an_operator_in_place_returns_its_argument_and_changes_its_version(through: Through) -> None:
    for _ in range(2):
        x = torch.ones(3)
        before = x._version
        assert x.mul_(2.0) is x
        assert x._version == before + 1
    assert made_again("aten.mul_.Tensor")


def test_numbers_that_are_equal_and_of_another_type_are_told_apart(through: Through) -> None:
    whole = torch.ones(3, dtype=torch.int64)
    assert [(whole * factor).dtype for factor in (1, 1.0, True, 1.0)] == [
        torch.int64, torch.float32, torch.int64, torch.float32,
    ]  # fmt: skip


def test_the_default_dtype_is_part_of_the_question(through: Through) -> None:
    usual = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.bfloat16):
            torch.set_default_dtype(dtype)
            assert torch.ones(2).dtype == dtype
    finally:
        torch.set_default_dtype(usual)


def test_known_values_and_complex_numbers_are_left_to_torch(through: Through) -> None:
    assert [torch.tensor(value).item() for value in (3.0, 4.0)] == [3.0, 4.0]
    plane = torch.ones(4, 2)
    for _ in range(2):
        assert torch.view_as_complex(plane).conj().is_conj()
    assert not made_again("aten.view_as_complex.default")
    for _ in range(2):
        with pytest.raises(Exception, match=r"data-dependent|nonzero"):
            torch.ones(3).nonzero().tolist()


def test_gradients_are_those_of_torch(through: Through) -> None:
    for _ in range(2):
        weight = torch.nn.Parameter(torch.ones(4, 4))
        ((torch.ones(2, 4) @ weight).relu() * 2.0).sum().backward()
        assert weight.grad is not None
        assert looks(weight.grad) == looks(weight.detach())


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(method, marks=() if method in ("grass-move", "lora") else pytest.mark.exhaustive)
        for method in METHODS
    ],
)
def test_no_forecast_depends_on_it(method: str) -> None:
    """Torch's own answers throughout, against answers made again: the same bytes everywhere."""
    with patch("harness.forecasting.memo._key", lambda *_: None):
        alone = forecast(small(method, "lean"))
    found = small_forecast(method, "lean")
    for name in ("peak_bytes", "by_phase", "by_kind", "by_draw", "largest_elements", "device_state_bytes"):
        assert getattr(found, name) == getattr(alone, name), name


def test_memory_that_an_answer_shares_is_not_taken_for_memory_of_its_own() -> None:
    """The difference that the comparison above must see."""
    cell = small("lora", "lean")
    right = forecast(cell)

    def own(self: Memo, args: Any, kwargs: Any, tensor: Any) -> Any:
        found = part(self, args, kwargs, tensor)
        return None if found is None or found.is_argument else replace(found, argument=None)

    part = Memo._part
    with patch.dict(memo._ANSWERS, clear=True), patch.object(Memo, "_part", own):
        assert forecast(cell).by_phase != right.by_phase
