"""Held-out loss: how well a model expects the reference `output` of test rows it was not trained on.

The loss uses the *training* template and only the answer's tokens (with its end token, if the row was not cut),
whatever the run's own loss mask was, so that runs can be compared. It still separates methods whose accuracy is
saturated.

The meaning of the number depends on `output`. In generated suites and in the commonsense files it is the gold answer in
words. In the arithmetic files of LLM-Adapters it is a language model's rationale, which may contradict `answer` (its
last number is the gold answer in 771 of 1,319 gsm8k rows): there the loss measures how well the model imitates that
rationale, not how often it is right. In mawps and mathqa `output` is empty and there is no loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from harness.inputs.prompts import Prompt, Row
from harness.inputs.tokens import IGNORED, check_ids, encode
from harness.training.validation import losses_of_rows

TOKENS_AT_ONCE = 4096
"""Tokens in a forward pass, padding included: memory must not grow with the rows that generation takes at once."""


@dataclass(frozen=True, kw_only=True)
class DocumentLoss:
    """Loss of one row: the mean in nats over `tokens` answer tokens; None (and 0 tokens) where there is none."""

    loss: float | None
    tokens: int


@dataclass(frozen=True, kw_only=True)
class HeldoutLoss:
    """Losses of a suite, in the order of its rows."""

    documents: tuple[DocumentLoss, ...]
    truncated_rows: int
    """Rows cut at `max_length`: their loss covers the tokens before the cut."""

    @property
    def tokens(self) -> int:
        """Answer tokens with a loss."""
        return sum(document.tokens for document in self.documents)

    @property
    def mean(self) -> float | None:
        """Mean nats per answer token, all tokens weighted equally; None if no row has a loss or one is not finite."""
        total = math.fsum(document.loss * document.tokens for document in self.documents if document.loss is not None)
        return total / self.tokens if self.tokens and self.why is None else None

    @property
    def why(self) -> str | None:
        """Why `mean` is None."""
        if any(document.tokens and document.loss is None for document in self.documents):
            return "the model's loss is not finite"
        return None if self.tokens else "no row has a reference output"


def heldout_loss(model: Any, prompt: Prompt, rows: Sequence[Row], *, max_length: int, batch_size: int) -> HeldoutLoss:
    """Loss of every row's reference output.

    How rows are batched changes results only by rounding (`training.validation`).

    Args:
        model: a causal language model in evaluation mode.
        prompt: as in training, with that model's tokenizer.
        rows: test rows.
        max_length: tokens of prompt and output a row is cut to, as in training.
        batch_size: of such rows in a forward pass, at most; passes are also bounded by `TOKENS_AT_ONCE`.

    Raises:
        UserError: a row has a token that the model's embedding has no row for.
    """
    encoded = {
        number: encode(prompt, row, max_length=max_length, loss_on="answer")
        for number, row in enumerate(rows)
        if row["output"].strip()
    }
    ids = (row.input_ids for row in encoded.values())
    check_ids(ids, tokenizer=prompt.tokenizer, embedding=model.get_input_embeddings())
    answered = [number for number, row in encoded.items() if any(label != IGNORED for label in row.labels[1:])]
    found = losses_of_rows(
        model,
        [encoded[number] for number in answered],
        tokens_at_once=min(TOKENS_AT_ONCE, batch_size * max_length),
        pad_id=prompt.tokenizer.pad_token_id or 0,
    )
    documents = [DocumentLoss(loss=None, tokens=0)] * len(rows)
    for number, (nats, tokens) in zip(answered, found, strict=True):
        mean = nats / tokens
        documents[number] = DocumentLoss(loss=mean if math.isfinite(mean) else None, tokens=tokens)
    return HeldoutLoss(documents=tuple(documents), truncated_rows=sum(row.truncated for row in encoded.values()))
