"""The one training loss: summed cross-entropy of the labelled tokens, whole or in chunks that need little memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHUNK_ROWS = 256
"""Tokens whose logits are alive at once in `chunked_token_loss`: a matrix product with fewer rows is bound by reading
the head (an H100 needs about 295 FLOP a byte: 990 TFLOP/s at 3.35 TB/s), with more it only costs memory."""

NO_TARGET = -100


def token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy in fp32, summed over the label tokens of `batch` (nats, scalar).

    Summed, not averaged: divided by the label tokens of the whole optimizer step it makes accumulation exact, where a
    mean of micro-batch means would weigh short answers more.

    Args:
        model: a causal language model.
        batch: `input_ids`, `attention_mask` and `labels` of shape (rows, length); label -100 is no target.
    """
    logits = _logits(model, batch).flatten(0, 1).float()
    return F.cross_entropy(logits, _targets(batch), ignore_index=NO_TARGET, reduction="sum")


def chunked_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """`token_loss` to rounding, without ever holding logits of more than `CHUNK_ROWS` tokens.

    The head is applied by this function, not by the model, so it must be a plain linear layer and the model must do
    nothing with the logits after it. Torch's own `linear_cross_entropy` (2.13) is not used: it returns the sum in the
    weights' dtype, which leaves a bf16 loss three digits, and a custom operator hides its buffers from every count of
    memory.

    Args:
        model: a causal language model of transformers, perhaps wrapped by peft.
        batch: as for `token_loss`.

    Raises:
        ValueError: the head is no plain linear layer, or the model scales or caps its logits.
    """
    head = _plain_head(model)
    with _without_head(head) as handed_over:
        hidden = _logits(model, batch)
    if not handed_over or hidden is not handed_over[-1]:
        raise ValueError(
            f"{type(model).__name__} changes its logits after the head (scaling, soft capping or a cast), which the "
            "chunked loss cannot do piece by piece: use the plain loss for this model"
        )
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden.flatten(0, 1), head.weight, head.bias, _targets(batch))
    return loss


def label_tokens(batch: Mapping[str, Tensor]) -> int:
    """Number of label tokens that enter the loss."""
    return int((batch["labels"][:, 1:] != NO_TARGET).sum())


def _logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return logits


def _targets(batch: Mapping[str, Tensor]) -> Tensor:
    """Target of every position, flattened; the labels are shifted, since slicing logits would copy them."""
    return F.pad(batch["labels"][:, 1:], (0, 1), value=NO_TARGET).flatten()


def _plain_head(model: nn.Module) -> nn.Linear:
    get: Any = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    if type(head) is not nn.Linear:
        found = "none that the model names" if head is None else f"a {type(head).__name__}"
        raise ValueError(f"the chunked loss needs a head that is a plain nn.Linear, not {found}: use the plain loss")
    return head


@contextmanager
def _without_head(head: nn.Linear) -> Iterator[list[Tensor]]:
    """Let `head` hand its input on unchanged; yields the list of what it was given."""
    given: list[Tensor] = []

    def hand_over(hidden: Tensor) -> Tensor:
        given.append(hidden)
        return hidden

    before = vars(head).get("forward")
    head.forward = hand_over  # type: ignore[method-assign,assignment]
    try:
        yield given
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before  # type: ignore[method-assign,assignment]


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `linear(hidden, weight, bias)`; arithmetic beyond the matrix products is fp32.

    The gradient of `hidden` is made in the forward pass, chunk by chunk of tokens, so that a frozen head is multiplied
    no more often than in the plain loss. The gradient of a trained head is made in the backward pass, chunk by chunk
    of the *vocabulary*: each entry is then one product over all tokens, rounded once, and no fp32 copy of the head's
    gradient is needed to add chunks up. That costs one more product with the head.
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
    """(1 where a token has a target, else 0; the target, 0 where there is none), both of shape (tokens, 1)."""
    column = targets.unsqueeze(1)
    return (column != NO_TARGET).float(), column.clamp_min(0)
