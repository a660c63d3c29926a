"""The one training loss: summed cross-entropy of the labelled tokens."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn import functional as F


def token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy in fp32, summed over the label tokens of `batch` (nats, scalar).

    Summed, not averaged: divided by the label tokens of the whole optimizer step it makes accumulation exact, where a
    mean of micro-batch means would weigh short answers more.

    Args:
        model: a causal language model.
        batch: `input_ids`, `attention_mask` and `labels` of shape (rows, length); label -100 is no target.
    """
    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    # the labels are shifted, not the logits: slicing logits would copy the largest tensor of the step
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="sum")


def label_tokens(batch: Mapping[str, Tensor]) -> int:
    """Number of label tokens that enter the loss."""
    return int((batch["labels"][:, 1:] != -100).sum())
