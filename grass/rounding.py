"""Stochastic rounding to bf16: a small update is lost or doubled by chance, and right on average.

Rounding to nearest loses every update smaller than half the distance to the next bf16 number, at every step anew
(Zamirai et al. 2020, "Revisiting BFloat16 Training", arXiv 2010.06192, for weights; the second moment has it alike).
"""

from __future__ import annotations

import torch
from torch import Tensor

_KEPT = -1 << 16
"""Mask over the bits of an fp32 number: its upper half is the bf16 number next to it towards zero."""

_EXPONENT = 0x7F80_0000
"""The exponent bits of an fp32 number: all set in inf and nan, and in them alone."""

_LARGEST = torch.finfo(torch.bfloat16).max


@torch.no_grad()
def round_stochastically(values: Tensor, out: Tensor, generator: torch.Generator) -> None:
    """Round `values` into `out`, each to one of its two bf16 neighbours, so that its expectation is the value itself.

    A value that lies the fraction f of the way from its neighbour nearer zero to the other becomes the other with
    probability f, exactly: f has 16 bits, and so has the random number added to the bits of the value before the lower
    half is cut off. Hence a bf16 number never changes (-0.0 and subnormals included), and -x is rounded as x is. inf
    and nan stay what they are. A finite value beyond the largest bf16 number (3.39e38) becomes that number, of its
    sign: the other neighbour would be inf, no expectation could be right, and one inf would end the training.

    The result depends on the values, in their order, and the generator's state, not on strides. A caller that rounds
    in chunks and seeds the generator for each gets the same chunk whatever was rounded before it; other cuts are other
    random numbers. One generator running on through the chunks gives the result of no cut at all on the CPU only.

    Needs 5 bytes of temporary memory per element: one int32 for the bits, one bool for what is not finite.

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
