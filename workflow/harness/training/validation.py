"""Losses that are only evaluated, with little memory: batches bounded by tokens, logits of labelled tokens only.

Validation comes after the last step, so it must not be what a run fails on: it needs less memory than a step, and where
memory runs out nevertheless, it goes on with batches of half the size.

It computes in the weights' own dtype, in a run whose forward passes are bf16 autocast too. Autocast would round the
weights, which takes back every update below half a bf16 unit: after five steps at 1e-5 a SmolLM2 of 135 M parameters
had a loss of 1.393 (from 1.553), of which bf16 saw 1.527.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from harness.inputs.tokens import Encoded, collate
from harness.step.loss import logits_are_plain, row_losses
from harness.step.outcomes import is_out_of_memory
from harness.training.batches import on_device


def mean_loss(
    model: nn.Module,
    rows: Sequence[Encoded],
    *,
    tokens_at_once: int,
    pad_id: int,
    on_halved: Callable[[int], None] = lambda tokens: None,
) -> float:
    """Mean nats per label token over all rows, in evaluation mode; arguments as for `losses_of_rows`."""
    training = model.training
    model.eval()
    try:
        found = losses_of_rows(model, rows, tokens_at_once=tokens_at_once, pad_id=pad_id, on_halved=on_halved)
    finally:
        model.train(training)
    return sum(loss for loss, _ in found) / sum(tokens for _, tokens in found)


@torch.inference_mode()
def losses_of_rows(
    model: nn.Module,
    rows: Sequence[Encoded],
    *,
    tokens_at_once: int,
    pad_id: int,
    on_halved: Callable[[int], None] = lambda tokens: None,
) -> list[tuple[float, int]]:
    """Summed nats and number of label tokens of every row, in the order of `rows`.

    Rows are sorted by length before they are batched, to reduce padding; padding is masked, so the size of the batches
    changes results only by rounding.

    Args:
        model: a causal language model in evaluation mode.
        rows: each with at least one label token besides its first.
        tokens_at_once: tokens in one forward pass, padding included; a longer row has a pass of its own.
        pad_id: any token.
        on_halved: told the new `tokens_at_once` when memory ran out.

    Raises:
        RuntimeError: memory runs out with a single row.
    """
    device = next(model.parameters()).device.type
    found: dict[int, tuple[float, int]] = {}
    left = sorted(range(len(rows)), key=lambda number: len(rows[number].input_ids))
    alone = bool(left) and not logits_are_plain(model, on_device(collate([rows[left[0]]], pad_id), device))
    while left:
        # the longest first: what does not fit is noticed at once
        numbers = left[-1:] if alone else left[-_fitting(rows, left, tokens_at_once) :]
        batch = on_device(collate([rows[number] for number in numbers], pad_id), device)
        try:
            losses = row_losses(model, batch, in_chunks=not alone)
        except (MemoryError, RuntimeError) as error:
            if len(numbers) == 1 or not is_out_of_memory(error):
                raise
            losses = None
        if losses is None:  # out of the handler: until then the error holds the tensors of the pass that failed
            tokens_at_once = len(numbers) * len(rows[numbers[-1]].input_ids) // 2
            on_halved(tokens_at_once)
            if device == "cuda":
                torch.cuda.empty_cache()
            continue
        found |= dict(zip(numbers, losses, strict=True))
        del left[-len(numbers) :]
    return [found[number] for number in range(len(rows))]


def _fitting(rows: Sequence[Encoded], ascending: Sequence[int], tokens: int) -> int:
    """How many of the longest rows fit into `tokens`, at least one."""
    return max(1, tokens // len(rows[ascending[-1]].input_ids))
