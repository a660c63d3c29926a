"""Cross-entropy of a frozen language-model head without the logits of all tokens at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_TOKENS = 512
"""Tokens whose logits are alive at once, in fp32 (62 MiB for 32,000 words)."""

TORCH_HAS_IT = hasattr(F, "linear_cross_entropy") and hasattr(nn, "LinearCrossEntropyOptions")
"""Whether this torch has a chunked `linear_cross_entropy`; 2.13 does."""

LOSS = "torch.nn.functional.linear_cross_entropy" if TORCH_HAS_IT else f"own, chunks of {CHUNK_TOKENS} tokens"
"""Which implementation `head_loss` uses."""


def head_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of `hidden @ weight.T`, equal to the unchunked one but for rounding.

    Args:
        hidden: shape (tokens, width).
        weight: the head's, shape (words, width); it must not require a gradient.
        targets: word numbers, shape (tokens,).
    """
    if TORCH_HAS_IT:
        return F.linear_cross_entropy(hidden, weight, targets, options=nn.LinearCrossEntropyOptions())
    return chunked_cross_entropy(hidden, weight, targets)


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`head_loss` for torch without it.

    Raises:
        ValueError: the weight requires a gradient, which is not computed here.
    """
    if weight.requires_grad:
        raise ValueError("the head's weight requires a gradient, which is not computed here: freeze it")
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, targets)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradient of a chunk's hidden states is computed beside its loss, so that its logits need not be kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden)
        for part, wanted, slope in zip(
            hidden.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), gradient.split(CHUNK_TOKENS), strict=True
        ):
            log_p = (part @ weight.T).float().log_softmax(1)
            total -= log_p.gather(1, wanted[:, None]).sum()
            p = log_p.exp_()
            p.scatter_add_(1, wanted[:, None], p.new_full((len(wanted), 1), -1.0))
            torch.mm((p / len(targets)).to(weight.dtype), weight, out=slope)
        ctx.save_for_backward(gradient)
        return total / len(targets)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None
