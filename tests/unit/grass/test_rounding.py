"""Stochastic rounding to bf16: exact where it must be, right on average elsewhere; and why AdamW wants it."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from grass.rounding import round_stochastically

BF16 = torch.finfo(torch.bfloat16)
INF = math.inf


def rounded(values: Tensor, seed: int = 0) -> Tensor:
    out = torch.empty(values.shape, dtype=torch.bfloat16)
    round_stochastically(values, out, torch.Generator().manual_seed(seed))
    return out


def fp32_of(patterns: list[int]) -> Tensor:
    """The fp32 numbers of these bit patterns, 0 to 2**32 - 1."""
    return torch.tensor(patterns, dtype=torch.int64).to(torch.int32).view(torch.float32)


def bits(values: Tensor) -> list[int]:
    return values.view(torch.int16 if values.dtype == torch.bfloat16 else torch.int32).tolist()


def neighbours(value: float) -> tuple[float, float]:
    """The largest bf16 number not above `value` and the smallest not below it, found without looking at bits."""
    nearest = torch.tensor(value).to(torch.bfloat16)
    lower, upper = (float(nearest.nextafter(torch.tensor(end, dtype=torch.bfloat16))) for end in (-INF, INF))
    candidates = (lower, float(nearest), upper)
    return max(c for c in candidates if c <= value), min(c for c in candidates if c >= value)


@given(
    upper=st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=64),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_bf16_number_keeps_every_bit(upper: list[int], seed: int) -> None:
    exact = fp32_of([u << 16 for u in upper])
    result = rounded(exact, seed)
    nan = exact.isnan()
    assert torch.equal(result.isnan(), nan)
    assert bits(result[~nan].float()) == bits(exact[~nan])


@given(
    patterns=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_value_becomes_one_of_its_two_neighbours(patterns: list[int], seed: int) -> None:
    values = fp32_of(patterns)
    for value, result in zip(values.tolist(), rounded(values, seed).tolist(), strict=True):
        if not math.isfinite(value):
            assert math.isnan(result) if math.isnan(value) else result == value
        elif abs(value) >= BF16.max:
            assert result == math.copysign(BF16.max, value)
        else:
            assert result in neighbours(value)
            assert math.copysign(1, result) == math.copysign(1, value)


@pytest.mark.parametrize(
    "value",
    [
        1.001,
        -1.001,
        0.9999,
        0.02,
        1.0078,  # nearly the next bf16 number, 1 + 2**-7
        3.3e38,  # near the largest
        1.2e-38,  # around the smallest normal number, 1.18e-38
        -1e-39,  # subnormal in both formats
        3e-41,  # below the smallest bf16 number, 9.2e-41: becomes 0 or that
        1e-45,  # fp32's smallest
    ],
)
def test_the_mean_of_many_roundings_is_the_value(value: float) -> None:
    values = torch.full((1 << 18,), value)
    exact = float(values[0])
    below, above = neighbours(exact)
    results = rounded(values).double()
    fraction = (exact - below) / (above - below)
    # five standard deviations of the mean: a right generator exceeds them with one seed in two million
    bound = 5 * (above - below) * math.sqrt(fraction * (1 - fraction) / len(results))
    assert abs(float(results.mean()) - exact) <= bound


def test_the_share_rounded_up_is_the_share_of_the_way_up() -> None:
    # all 2**16 fp32 numbers from 1 to the next bf16 number
    values = fp32_of([0x3F80_0000 + fraction for fraction in range(1 << 16)])
    up = torch.stack([rounded(values, seed) for seed in range(64)]) > 1
    share = up.double().mean(0).view(16, -1).mean(1)
    expected = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    # five standard deviations of a share of 64 * 4096 draws
    assert torch.all((share - expected).abs() <= 5 * (0.25 / (64 * 4096)) ** 0.5)
    assert not up[:, 0].any()


def test_the_random_number_reaches_both_ends_of_its_range_and_not_beyond() -> None:
    # 1, the fp32 number after it, and the last one before the next bf16 number: 2**22 times each
    exact, first, last = (
        rounded(fp32_of([pattern]).expand(1 << 22)) for pattern in (0x3F80_0000, 0x3F80_0001, 0x3F80_FFFF)
    )
    assert (exact == 1).all()
    # one in 2**16 is expected, 64 in all, with a standard deviation of 8
    assert 24 < int((first != 1).sum()) < 104
    assert 24 < int((last == 1).sum()) < 104


def test_a_value_and_its_negative_are_rounded_alike() -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(1))
    assert torch.equal(rounded(-values), -rounded(values))


def test_what_is_not_finite_stays_what_it_is() -> None:
    # nan in every disguise: with sign, with all bits set (adding to them would wrap round), with low bits alone
    patterns = [0x7FC0_0000, 0xFFC0_0000, 0x7FFF_FFFF, 0xFFFF_FFFF, 0x7F80_0001, 0xFF80_0001]
    for seed in range(20):
        assert rounded(fp32_of(patterns), seed).isnan().all()
        assert rounded(torch.tensor([INF, -INF]), seed).tolist() == [INF, -INF]


def test_a_finite_value_beyond_the_largest_bf16_number_becomes_it_and_never_inf() -> None:
    # from just above bf16's largest number to fp32's largest
    beyond = fp32_of([*range(0x7F7F_0001, 0x7F7F_FFFF, 251), 0x7F7F_FFFF])
    for seed in range(20):
        assert (rounded(beyond, seed) == BF16.max).all()
        assert (rounded(-beyond, seed) == -BF16.max).all()
    # where rounding to nearest gives inf for half of them
    assert beyond.to(torch.bfloat16).isinf().any()


def test_zeros_keep_their_sign_and_empty_tensors_pass() -> None:
    assert bits(rounded(torch.tensor([0.0, -0.0]))) == [0, -(1 << 15)]
    assert rounded(torch.empty(0)).shape == (0,)
    assert rounded(torch.tensor(1.5)).item() == 1.5


def test_the_same_seed_rounds_alike_and_another_differently() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    before = values.clone()
    assert torch.equal(rounded(values, 7), rounded(values, 7))
    assert not torch.equal(rounded(values, 7), rounded(values, 8))
    assert torch.equal(values, before)


def test_neither_the_global_generator_nor_strides_matter() -> None:
    values = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    state = torch.get_rng_state()
    expected = rounded(values)
    assert torch.equal(torch.get_rng_state(), state)
    wide = torch.empty(30, 80, dtype=torch.bfloat16)
    round_stochastically(values.t().contiguous().t(), wide[:, ::2].t(), torch.Generator().manual_seed(0))
    assert torch.equal(wide[:, ::2].t(), expected)


def test_a_chunk_seeded_by_itself_does_not_depend_on_the_others() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator()

    def by_chunks(starts: list[int]) -> Tensor:
        out = torch.empty(1000, dtype=torch.bfloat16)
        for start in starts:
            round_stochastically(values[start : start + 250], out[start : start + 250], generator.manual_seed(start))
        return out

    assert torch.equal(by_chunks([0, 250, 500, 750]), by_chunks([750, 0, 500, 250]))


@given(cuts=st.lists(st.integers(0, 1000), max_size=6))
def test_on_the_cpu_one_generator_through_all_chunks_gives_the_uncut_result(cuts: list[int]) -> None:
    # values that need no rounding, or cannot be, take their draw as well: the next chunk must not feel them
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1))
    values[::3] = 1.0
    values[::7] = INF
    generator, out = torch.Generator().manual_seed(0), torch.empty(1000, dtype=torch.bfloat16)
    for start, end in pairwise([0, *sorted(cuts), 1000]):
        round_stochastically(values[start:end], out[start:end], generator)
    assert torch.equal(out, rounded(values))


def test_parameters_are_rounded_into_in_place() -> None:
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    round_stochastically(nn.Parameter(torch.ones(3)), parameter, torch.Generator())
    assert parameter.tolist() == [1, 1, 1]
    assert parameter.is_leaf


def test_wrong_dtypes_and_shapes_are_refused() -> None:
    fp32, bf16 = torch.ones(3), torch.ones(3, dtype=torch.bfloat16)
    generator = torch.Generator()
    for values in (bf16, fp32.double(), fp32.half()):
        with pytest.raises(TypeError, match=r"values must be torch\.float32"):
            round_stochastically(values, bf16, generator)
    for out in (fp32, fp32.half()):
        with pytest.raises(TypeError, match=r"out must be torch\.bfloat16"):
            round_stochastically(fp32, out, generator)
    with pytest.raises(ValueError, match=r"shape of values, \(3,\), not \(2, 3\)"):
        round_stochastically(fp32, torch.ones(2, 3, dtype=torch.bfloat16), generator)


DECAY_STEPS = 300


def second_moments_of_torchs_adamw(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Second moments after one step with gradients N(0, 1), and after 300 more with none."""
    parameter = nn.Parameter(torch.zeros(65_536, dtype=dtype))
    optimizer = torch.optim.AdamW([parameter], betas=(0.9, 0.999))
    parameter.grad = torch.randn(65_536, generator=torch.Generator().manual_seed(0)).to(dtype)
    optimizer.step()
    first = optimizer.state[parameter]["exp_avg_sq"].clone()
    parameter.grad.zero_()
    for _ in range(DECAY_STEPS):
        optimizer.step()
    return first, optimizer.state[parameter]["exp_avg_sq"]


def test_a_bf16_second_moment_of_torchs_adamw_never_decays() -> None:
    first, last = second_moments_of_torchs_adamw(torch.bfloat16)
    assert first.dtype == last.dtype == torch.bfloat16
    assert torch.equal(first, last)
    first, last = second_moments_of_torchs_adamw(torch.float32)
    torch.testing.assert_close(last, first * 0.999**DECAY_STEPS, rtol=1e-4, atol=0)


def test_a_bf16_second_moment_rounded_stochastically_decays_on_average() -> None:
    second = second_moments_of_torchs_adamw(torch.bfloat16)[0]
    expected = float(second.double().mean()) * 0.999**DECAY_STEPS
    generator = torch.Generator().manual_seed(0)
    for _ in range(DECAY_STEPS):
        round_stochastically(second.float() * 0.999, second, generator)
    # a step rounds 0.001 v by chance to 0 or up to 2**-7 v: 300 steps give one entry an error under 4.9 % of v,
    # and the mean of v over 65,536 entries (v = g^2, whose mean square is 3 times its squared mean) one of 0.033 %
    assert float(second.double().mean()) == pytest.approx(expected, rel=5 * 0.00033)
