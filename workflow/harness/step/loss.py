"""The one training loss: summed cross-entropy of the labelled tokens, whole or in chunks that need little memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from grass.loss import NO_TARGET, chunked_cross_entropy


def token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy in fp32, summed over the label tokens of `batch` (nats, scalar).

    Summed, not averaged: dividing the sum by the label tokens of the whole optimizer step makes gradient accumulation
    exact, whereas a mean of micro-batch means would give short answers more weight.

    Args:
        model: a causal language model.
        batch: `input_ids`, `attention_mask` and `labels` of shape (rows, length); label -100 is no target.
    """
    logits = _logits(model, batch).flatten(0, 1).float()
    return F.cross_entropy(logits, _targets(batch), ignore_index=NO_TARGET, reduction="sum")


def chunked_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Equal to `token_loss` up to rounding, but holds the logits of only a few tokens at a time (`grass.loss`).

    This function applies the head, not the model. So the head must be a plain linear layer, and the model must not
    change the logits afterwards.

    Args:
        model: a causal language model of transformers, perhaps wrapped by peft.
        batch: as for `token_loss`.

    Raises:
        ValueError: the head is not a plain linear layer, or the model scales or caps its logits.
    """
    head = _plain_head(model)
    with _without_head(head) as handed_over:
        hidden = _logits(model, batch)
    if not handed_over or hidden is not handed_over[-1]:
        raise ValueError(
            f"{type(model).__name__} changes its logits after the head (scaling, soft capping or a cast), which the "
            "chunked loss cannot do piece by piece: use the plain loss for this model"
        )
    return chunked_cross_entropy(hidden.flatten(0, 1), head.weight, _targets(batch), head.bias)


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
