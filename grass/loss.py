"""Cross-entropy of a language-model head, a few tokens at a time: the logits of all tokens never exist at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_ROWS = 256
"""Tokens whose logits are alive at once in `chunked_cross_entropy`. With fewer rows, the matrix product is bound by
reading the head (an H100 needs about 295 FLOP a byte: 990 TFLOP/s at 3.35 TB/s); more rows only cost memory."""

NO_TARGET = -100


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    """Cross-entropy of `linear(hidden, weight, bias)`, summed in fp32 (nats, scalar); the plain loss up to rounding.

    Torch's own `linear_cross_entropy` (2.13) is not used: it returns the sum in the weights' dtype, which leaves a bf16
    loss three digits, and as a custom operator it hides its buffers from every memory counter.

    Args:
        hidden: shape (tokens, width).
        weight: the head's, shape (vocabulary, width).
        targets: token ids, shape (tokens,); -100 means no target.
        bias: the head's, shape (vocabulary,).
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, weight, bias, targets)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `linear(hidden, weight, bias)`; everything but the matrix products is computed in fp32.

    The forward pass computes the gradient of `hidden` in chunks of tokens, so a frozen head needs no more matrix
    products than the plain loss. The backward pass computes the gradient of a trained head in chunks of the
    *vocabulary*: each entry is then one product over all tokens, rounded once, and no fp32 copy of the head's gradient
    is needed to sum chunks. That costs one more product with the head.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        """Hidden (tokens, width), weight (vocabulary, width), bias (vocabulary) or None, targets (tokens)."""
        of_hidden, of_head = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty_like(hidden) if of_hidden else None
        log_sums = torch.empty(len(hidden), 1, dtype=torch.float32, device=hidden.device) if of_head else None
        for start in range(0, len(hidden), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            scores = F.linear(hidden[rows], weight, bias).float()
            counts, place = _split(targets[rows])
            # in place from here on: logsumexp and softmax would each hold another copy of the scores
            largest = scores.amax(1, keepdim=True)
            at_target = scores.sub_(largest).gather(1, place)
            total = scores.exp_().sum(1, keepdim=True)
            loss += ((total.log() - at_target) * counts).sum()
            if log_sums is not None:
                log_sums[rows] = largest + total.log()
            if gradient is not None:
                scores.div_(total).scatter_(1, place, at_target.exp().div_(total).sub_(1)).mul_(counts)
                torch.mm(scores.to(weight.dtype), weight, out=gradient[rows])
            del scores
        kept = (hidden, weight, bias, targets, log_sums) if of_head else (None, None, None, None, None)
        ctx.save_for_backward(gradient, *kept)
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:  # type: ignore[override]
        """Gradients of hidden, weight and bias, in their dtypes, times `upstream` (scalar)."""
        gradient, hidden, weight, bias, targets, log_sums = ctx.saved_tensors
        of_hidden = gradient * upstream if gradient is not None else None
        of_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        of_bias = torch.empty_like(bias) if ctx.needs_input_grad[2] else None
        if of_weight is None and of_bias is None:
            return of_hidden, None, None, None
        counts, place = _split(targets)
        factor = counts * upstream
        width = max(1, len(weight) * CHUNK_ROWS // len(hidden))
        for start in range(0, len(weight), width):
            words = slice(start, start + width)
            part = None if bias is None else bias[words]
            scores = F.linear(hidden, weight[words], part).float().sub_(log_sums).exp_()
            inside = ((place >= start) & (place < start + width)).float()
            local = (place - start).clamp_(0, scores.shape[1] - 1)
            scores.scatter_(1, local, scores.gather(1, local).sub_(inside)).mul_(factor)
            if of_weight is not None:
                torch.mm(scores.to(weight.dtype).t(), hidden, out=of_weight[words])
            if of_bias is not None:
                of_bias[words] = scores.sum(0)
            del scores
        return of_hidden, of_weight, of_bias, None


def _split(targets: Tensor) -> tuple[Tensor, Tensor]:
    """(1 if a token has a target, else 0; the target, or 0 if there is none), both of shape (tokens, 1)."""
    column = targets.unsqueeze(1)
    return (column != NO_TARGET).float(), column.clamp_min(0)
