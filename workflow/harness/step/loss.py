"""The one training loss: summed cross-entropy of the labelled tokens, whole or in chunks that need little memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.method import host_number
from grass.loss import CHUNK_ROWS, NO_TARGET, chunked_cross_entropy


def token_loss(model: nn.Module, batch: Mapping[str, Tensor], *, autocast: bool = False) -> Tensor:
    """Cross-entropy in fp32, summed over the label tokens of `batch` (nats, scalar).

    Summed, not averaged: dividing the sum by the label tokens of the whole optimizer step makes gradient accumulation
    exact, whereas a mean of micro-batch means would give short answers more weight.

    Args:
        model: a causal language model.
        batch: `input_ids`, `attention_mask` and `labels` of shape (rows, length); label -100 is no target.
        autocast: matrix products in bf16 over fp32 weights (`Recipe.autocast`). The loss stays in fp32.
    """
    logits = _logits(model, batch, autocast).flatten(0, 1).float()
    return F.cross_entropy(logits, _targets(batch), ignore_index=NO_TARGET, reduction="sum")


def chunked_token_loss(model: nn.Module, batch: Mapping[str, Tensor], *, autocast: bool = False) -> Tensor:
    """Equal to `token_loss` up to rounding, but holds the logits of only a few tokens at a time (`grass.loss`).

    This function applies the head, not the model. So the head must be a plain linear layer, and the model must not
    change the logits afterwards.

    Args:
        model: a causal language model of transformers, perhaps wrapped by peft.
        batch: as for `token_loss`.
        autocast: as for `token_loss`.

    Raises:
        ValueError: the head is not a plain linear layer, or the model scales or caps its logits.
    """
    hidden, weight, bias = _before_head(model, batch, autocast)
    return chunked_cross_entropy(hidden.flatten(0, 1), weight, _targets(batch), bias)


def loss_of(*, chunked: bool, autocast: bool) -> Callable[[nn.Module, Mapping[str, Tensor]], Tensor]:
    """The loss that a recipe asks for, as a function of model and batch."""
    return partial(chunked_token_loss if chunked else token_loss, autocast=autocast)


def check_chunked(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Try on two tokens of `batch` whether the loss can be computed in chunks; leaves the random state as it was.

    Raises:
        ValueError: as `chunked_token_loss`.
    """
    training = model.training
    try:
        with torch.no_grad():
            _before_head(model.eval(), {key: value[:1, :2] for key, value in batch.items()}, autocast=False)
    finally:
        model.train(training)


def logits_are_plain(model: nn.Module, batch: Mapping[str, Tensor]) -> bool:
    """Whether `chunked_token_loss` and `row_losses` in chunks can be used: tried on two tokens of `batch`."""
    try:
        check_chunked(model, batch)
    except ValueError:
        return False
    return True


def row_losses(model: nn.Module, batch: Mapping[str, Tensor], *, in_chunks: bool = True) -> list[tuple[float, int]]:
    """Cross-entropy of each row, summed over its label tokens (nats), and their number; for evaluation, no gradients.

    Only label tokens get logits in fp32, few at a time. Waits for the device.

    Args:
        model: as for `token_loss`.
        batch: as for `token_loss`.
        in_chunks: apply the head to label tokens alone, as far as `logits_are_plain`; otherwise the model itself makes
            the logits of every token.
    """
    targets = _targets(batch)
    labelled = targets != NO_TARGET
    if in_chunks:
        hidden, weight, bias = _before_head(model, batch, autocast=False)
    else:
        hidden = _logits(model, batch, autocast=False)
    hidden, targets = hidden.flatten(0, 1)[labelled], targets[labelled]
    losses = []
    for start in range(0, len(targets), CHUNK_ROWS):
        some = hidden[start : start + CHUNK_ROWS]
        logits = F.linear(some, weight, bias) if in_chunks else some
        losses.append(F.cross_entropy(logits.float(), targets[start : start + CHUNK_ROWS], reduction="none"))
    rows, length = batch["labels"].shape
    counts = labelled.view(rows, length).sum(1)
    row_of = torch.arange(rows, device=counts.device).repeat_interleave(counts)
    sums = torch.zeros(rows, dtype=torch.float64, device=counts.device).index_add_(
        0, row_of, torch.cat(losses).double()
    )
    return list(zip(sums.tolist(), counts.tolist(), strict=True))


def _before_head(model: nn.Module, batch: Mapping[str, Tensor], autocast: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The head's input, weight and bias, in the dtype that the head multiplies in; raises as `chunked_token_loss`."""
    head = _plain_head(model)
    with _without_head(head) as handed_over:
        hidden = _logits(model, batch, autocast)
    if not handed_over or hidden is not handed_over[-1]:
        raise ValueError(
            f"{type(model).__name__} changes its logits after the head (scaling, soft capping or a cast), which the "
            "chunked loss cannot do piece by piece: use the plain loss for this model"
        )
    if not autocast:
        return hidden, head.weight, head.bias
    bias = None if head.bias is None else head.bias.bfloat16()
    return hidden.bfloat16(), head.weight.bfloat16(), bias


def label_tokens(batch: Mapping[str, Tensor]) -> int:
    """Number of label tokens that enter the loss."""
    return int(host_number((batch["labels"][:, 1:] != NO_TARGET).sum()))


def _logits(model: nn.Module, batch: Mapping[str, Tensor], autocast: bool) -> Tensor:
    """The one forward pass of every loss. Backward follows outside autocast, as torch advises."""
    ids = batch["input_ids"]
    with torch.autocast(ids.device.type, torch.bfloat16) if autocast else nullcontext():
        logits: Tensor = model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False).logits
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
    """Make `head` return its input unchanged inside the block; yields the list of the inputs it received."""
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
