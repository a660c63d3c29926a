"""Moments in 8 bits: codes as both libraries have them, records that can be divided, and no weight that jumps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grass.adamw import AdamW, new_moments
from grass.host import PIECE_ELEMENTS
from grass.quantised import BLOCK, PACKED, RECORD_BYTES, SMALLEST, dynamic_map, moment_bytes, pack, stored_dtype, unpack

ENTRIES = 64 * BLOCK


def values(*, signed: bool, entries: int = ENTRIES, spread: float = 3.0) -> Tensor:
    """Numbers of many magnitudes, as moments are."""
    drawn = torch.Generator().manual_seed(0)
    found = torch.randn(entries, generator=drawn) * torch.exp(spread * torch.randn(entries, generator=drawn))
    return found if signed else found.square()


def packed(given: Tensor, *, signed: bool) -> Tensor:
    records = torch.full((moment_bytes(len(given), PACKED),), 7, dtype=PACKED)
    pack(given.clone(), records, signed=signed)
    return records


def nearest(given: Tensor, *, signed: bool) -> Tensor:
    """By definition: of all values of the map times the block's scale, the nearest one; quadratic."""
    known = torch.tensor(dynamic_map(signed=signed), dtype=torch.float64)[0 if signed else 1 :]
    blocks = given.view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True)
    share = (blocks / scale).double()
    return (known[(share[..., None] - known).abs().argmin(-1)] * scale).float().view(-1)


@pytest.mark.parametrize("signed", [True, False])
def test_every_entry_becomes_the_nearest_value_of_its_block(signed: bool) -> None:
    given = values(signed=signed)
    found, wanted = unpack(packed(given, signed=signed), ENTRIES, signed=signed), nearest(given, signed=signed)
    different = found != wanted
    # halves: the definition takes the lower of two that are as near
    assert different.double().mean() < 1e-3
    assert torch.allclose((found - given)[different].abs(), (wanted - given)[different].abs(), rtol=1e-4)


@pytest.mark.parametrize("signed", [True, False])
def test_the_search_finds_the_code_of_every_number(signed: bool) -> None:
    """By cells of the upper half of a number's bits: each must have one border of codes at most."""
    borders = torch.tensor(dynamic_map(signed=signed))
    borders = (borders[1:] + borders[:-1]) / 2
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)[:, None] * 65536 + torch.tensor([0, 1, 255, 65535])
    numbers = torch.cat([bits.view(-1).int().view(torch.float32), borders, borders.nextafter(torch.zeros(()))])
    numbers = numbers[numbers.abs() <= 1]
    numbers = numbers if signed else numbers[numbers >= 0]
    # one number a block, beside the 1 that is its scale
    blocks = torch.zeros(len(numbers), BLOCK)
    blocks[:, 0], blocks[:, 1] = numbers, 1.0
    codes = packed(blocks.view(-1), signed=signed).view(-1, RECORD_BYTES)[:, 0].int()
    wanted = torch.bucketize(numbers, borders, right=True).clamp(min=0 if signed else 1)
    assert torch.equal(codes, wanted.int())


def test_a_block_of_zeros_stays_one_and_its_neighbours_do_not_matter() -> None:
    for signed in (True, False):
        given = values(signed=signed)
        given[BLOCK : 2 * BLOCK] = 0
        found = unpack(packed(given, signed=signed), ENTRIES, signed=signed)
        assert not found[BLOCK : 2 * BLOCK].any()
        alone = unpack(packed(given[:BLOCK], signed=signed), BLOCK, signed=signed)
        assert torch.equal(found[:BLOCK], alone)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(wrong: float) -> None:
    for signed in (True, False):
        given = values(signed=signed)
        given[3] = wrong
        found = unpack(packed(given, signed=signed), ENTRIES, signed=signed)
        assert not found[3].isfinite()
        assert found[BLOCK:].isfinite().all()


@pytest.mark.parametrize("entries", [1, 255, 256, 257, 1000])
def test_the_last_record_is_filled_up(entries: int) -> None:
    given = values(signed=True, entries=entries)
    records = packed(given, signed=True)
    assert len(records) == RECORD_BYTES * -(-entries // BLOCK)
    filled = torch.cat([given, torch.zeros(-entries % BLOCK)])
    assert torch.equal(unpack(records, entries, signed=True), unpack(packed(filled, signed=True), entries, signed=True))


# ------------------------------------------------------------ beside the libraries


@pytest.mark.parametrize("signed", [True, False])
def test_map_and_codes_are_torchaos(signed: bool) -> None:
    theirs = pytest.importorskip("torchao.optim.quant_utils", reason="torchao is not installed")
    known = torch.tensor(theirs.create_dynamic_map(signed=signed))
    assert torch.equal(known, torch.tensor(dynamic_map(signed=signed)))
    given = values(signed=signed)
    scaled, scale = theirs.scale_tensor(given, BLOCK)
    codes = theirs.quantize_8bit_with_qmap(scaled, known)
    records = packed(given, signed=signed).view(-1, RECORD_BYTES)
    assert torch.equal(records[:, :BLOCK].reshape(-1), codes if signed else codes.clamp(min=1))
    assert torch.equal(records[:, BLOCK:].contiguous().view(torch.float32).view(-1), scale)


@pytest.mark.parametrize("signed", [True, False])
def test_no_entry_is_farther_from_its_value_than_by_bitsandbytes(signed: bool) -> None:
    theirs = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    if not hasattr(theirs, "create_dynamic_map"):
        pytest.skip("a stand-in for bitsandbytes")
    known = theirs.create_dynamic_map(signed=signed)
    assert torch.equal(known, torch.tensor(dynamic_map(signed=signed)))
    given = values(signed=signed)
    codes, scale = torch.ops.bitsandbytes.quantize_blockwise(given, known, BLOCK)
    records = packed(given, signed=signed)
    assert torch.equal(records.view(-1, RECORD_BYTES)[:, BLOCK:].contiguous().view(torch.float32).view(-1), scale)
    of_theirs = (known[codes.int()].view(-1, BLOCK) * scale[:, None]).view(-1)
    ours, others = (unpack(records, ENTRIES, signed=signed) - given).abs(), (of_theirs - given).abs()
    if not signed:  # what is 0 there is not here
        ours, others = ours[codes > 0], others[codes > 0]
    assert (ours <= others * (1 + 1e-4)).all()


def test_as_published_a_weight_jumps() -> None:
    """The same gradients as below, by torchao's own arithmetic without its compiler."""
    adam = pytest.importorskip("torchao.optim.adam", reason="torchao is not installed")
    zeros = pytest.importorskip("torchao.optim.subclass_8bit").OptimState8bit.zeros
    weight = torch.zeros(SMALLEST)
    first, second = zeros(weight.shape, True, BLOCK), zeros(weight.shape, False, BLOCK)
    with torch.no_grad():
        for step, gradient in enumerate(uneven(), 1):
            adam.single_param_adam(
                weight, gradient, torch.tensor(float(step)), first, second, None,
                torch.tensor(1e-3), 0.9, 0.999, 0.0, 1e-8, True, False,
            )  # fmt: skip
    assert weight.abs().argmax() == 5
    assert weight.abs().max() > 1000 * 3e-3


# ------------------------------------------------------------ the optimizer


def trained(optimizer: Any, weight: nn.Parameter, gradients: list[Tensor]) -> Tensor:
    start = weight.detach().clone()
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return (weight.detach() - start).abs()


def uneven() -> list[Tensor]:
    """One entry of a block has a gradient 1e-4 of the others' twice, then none: published 8-bit moments lose its v."""
    first, then = torch.ones(SMALLEST), torch.ones(SMALLEST)
    first[5], then[5] = 1e-4, 0.0
    return [first, first, then]


def test_no_weight_jumps_where_gradients_of_a_block_are_uneven() -> None:
    lr = 1e-3
    moved = {}
    for dtype in (torch.float32, PACKED):
        weight = nn.Parameter(torch.zeros(SMALLEST))
        moved[dtype] = trained(AdamW([weight], lr=lr, state_dtype=dtype), weight, uneven())
    assert moved[PACKED].max() <= 3 * lr * (1 + 1e-3)
    # the entry itself moves less than in fp32; all others as there, but for the codes' width
    assert 0 < moved[PACKED][5] <= moved[torch.float32][5]
    rest = torch.arange(SMALLEST) != 5
    assert torch.allclose(moved[PACKED][rest], moved[torch.float32][rest], rtol=0.01)


def test_with_a_code_for_0_in_the_second_map_it_would_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planted defect: the test above would fail."""
    from grass import quantised

    maps = {signed: quantised._map_on(torch.device("cpu"), signed) for signed in (True, False)}
    zero = maps[False].above.clone()
    zero[0] = 3.25e-7 / 2
    lowest = torch.where(maps[False].lowest == 1, 0, maps[False].lowest.int()).to(torch.uint8)
    maps[False] = quantised._Map(maps[False].values, zero, lowest)
    monkeypatch.setattr(quantised, "_map_on", lambda device, signed: maps[signed])
    weight = nn.Parameter(torch.zeros(SMALLEST))
    moved = trained(AdamW([weight], lr=1e-3, state_dtype=PACKED), weight, uneven())
    assert moved.argmax() == 5
    assert moved.max() > 0.5


def test_where_gradients_are_of_a_size_training_goes_as_with_fp32_moments() -> None:
    """Least squares: weights end apart by less than the width of the codes of small values, 5 %."""
    drawn = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 64, generator=drawn) * torch.logspace(-0.5, 0.5, 64)
    target = inputs @ torch.randn(64, 64, generator=drawn)
    ends = {}
    for dtype in (torch.float32, PACKED):
        weight = nn.Parameter(torch.zeros(64, 64))
        optimizer = AdamW([weight], lr=3e-2, state_dtype=dtype)
        for _ in range(100):
            loss = (inputs @ weight - target).square().mean()
            (weight.grad,) = torch.autograd.grad(loss, [weight])
            optimizer.step()
        assert loss < target.square().mean() / 50
        ends[dtype] = weight.detach()
    apart = (ends[PACKED] - ends[torch.float32]).norm() / ends[torch.float32].norm()
    assert 0 < apart < 0.05


def test_pieces_change_no_bit_and_small_tensors_stay_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for piece in (1000, 1 << 18):
        monkeypatch.setitem(PIECE_ELEMENTS, "cpu", piece)
        weights = [nn.Parameter(torch.ones(100, 100)), nn.Parameter(torch.ones(SMALLEST - 1))]
        optimizer = AdamW(weights, lr=1e-2, state_dtype=PACKED, weight_decay=0.1)
        for number in range(4):
            for weight in weights:
                weight.grad = values(signed=True, entries=weight.numel()).view(weight.shape) * (number - 1.5)
            optimizer.step()
        states = [optimizer.state[w] for w in weights]
        assert [s["exp_avg"].dtype for s in states] == [PACKED, torch.float32]
        assert [stored_dtype(w.numel(), PACKED) for w in weights] == [PACKED, torch.float32]
        ends.append(
            [t for w, s in zip(weights, states, strict=True) for t in (w.detach(), s["exp_avg"], s["exp_avg_sq"])]
        )
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_a_parameter_without_a_flat_view_is_updated_like_its_copy() -> None:
    plain, turned = nn.Parameter(torch.ones(64, 96)), nn.Parameter(torch.ones(96, 64).t())
    gradient = values(signed=True, entries=64 * 96).view(64, 96)
    for weight in (plain, turned):
        trained(AdamW([weight], lr=1e-2, state_dtype=PACKED), weight, [gradient, gradient])
    assert torch.equal(plain, turned)


def test_bytes_are_those_of_the_tensors() -> None:
    for entries in (1, SMALLEST - 1, SMALLEST, 5000, 1 << 16):
        moments = new_moments(nn.Parameter(torch.ones(entries)), PACKED)
        each = moment_bytes(entries, stored_dtype(entries, PACKED))
        assert moments["exp_avg"].nbytes == moments["exp_avg_sq"].nbytes == each
    assert 2 * moment_bytes(1 << 20, PACKED) / (1 << 20) == 2 * 260 / 256


def test_a_saved_state_goes_on_bit_for_bit() -> None:
    gradients = [values(signed=True, spread=s) for s in (1.0, 2.0, 3.0, 0.5)]
    straight, first, second = (nn.Parameter(torch.ones(ENTRIES)) for _ in range(3))
    trained(AdamW([straight], lr=1e-2, state_dtype=PACKED), straight, gradients)
    before = AdamW([first], lr=1e-2, state_dtype=PACKED)
    trained(before, first, gradients[:2])
    after = AdamW([second], lr=1e-2, state_dtype=PACKED)
    after.load_state_dict(before.state_dict())
    second.data.copy_(first.data)
    trained(after, second, gradients[2:])
    assert torch.equal(straight, second)
