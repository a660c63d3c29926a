"""Stochastic rounding to bf16: a small update is rounded up or down at random and is correct on average.

Rounding to nearest loses every update smaller than half the distance to the next bf16 number, in every step (Zamirai et
al. 2020, "Revisiting BFloat16 Training", arXiv 2010.06192, for weights; the same holds for the second moment).
"""

from __future__ import annotations

import torch
from torch import Tensor

_KEPT = -1 << 16
"""Mask over the bits of an fp32 number: its upper half is the bf16 number next to it towards zero."""

_EXPONENT = 0x7F80_0000
"""The exponent bits of an fp32 number: all set only in inf and nan."""

_LARGEST = torch.finfo(torch.bfloat16).max


@torch.no_grad()
def round_stochastically(values: Tensor, out: Tensor, generator: torch.Generator) -> None:
    """Round each of `values` into `out`, to one of its two bf16 neighbours, with the value itself as expectation.

    A value at fraction f of the way from its neighbour nearer zero to the other one is rounded to the other one with
    probability exactly f: f has 16 bits, as has the random number that is added to the value's bits before the lower
    half is cut off. Hence a bf16 number never changes (including -0.0 and subnormals), and -x is rounded like x. inf
    and nan are unchanged. A finite value beyond the largest bf16 number (3.39e38) becomes that number, with its sign:
    its other neighbour would be inf, no expectation could be right, and one inf would ruin the training.

    The result depends on the values, in their order, and on the generator's state, not on strides. If a caller rounds
    in chunks and seeds the generator for each, a chunk's result does not depend on what was rounded before; a different
    split gives different random numbers. One generator used across all chunks equals rounding without a split only on
    the CPU.

    Needs 5 bytes of temporary memory per element: one int32 for the bits, one bool that marks non-finite values.

    Args:
        values: fp32, any shape; not changed.
        out: bf16, the shape and device of `values`; overwritten.
        generator: on the same device; one draw per element is taken from it, whatever the values.

    Raises:
        TypeError: `values` is not fp32 or `out` not bf16.
        ValueError: the shapes differ.
    """
    if values.dtype != torch.float32:
        raise TypeError(f"values must be torch.float32, not {values.dtype}: convert with .float()")
    if out.dtype != torch.bfloat16:
        raise TypeError(f"out must be torch.bfloat16, not {out.dtype}: other dtypes are not rounded stochastically")
    if out.shape != values.shape:
        raise ValueError(f"out must have the shape of values, {tuple(values.shape)}, not {tuple(out.shape)}")
    bits = torch.empty(values.shape, dtype=torch.int32, device=values.device)
    torch.bitwise_and(values.view(torch.int32), _EXPONENT, out=bits)
    not_finite = bits == _EXPONENT
    bits.random_(0, 1 << 16, generator=generator)
    bits.add_(values.view(torch.int32)).bitwise_and_(_KEPT)
    rounded = bits.view(torch.float32).clamp_(-_LARGEST, _LARGEST)
    torch.where(not_finite, values, rounded, out=rounded)
    out.copy_(rounded)
