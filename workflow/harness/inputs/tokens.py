"""Rows to tokens, labels and batches, as the LLM-Adapters training script does it (protocol sheet, section 2)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.errors import UserError
from harness.inputs.prompts import Prompt, Row
from harness.records.run import DataUse

IGNORED = -100
"""Label of a token that does not enter the loss."""


@dataclass(frozen=True)
class Encoded:
    """One row as tokens; `labels` are as long as `input_ids`, not shifted, -100 where no loss is taken."""

    input_ids: list[int]
    labels: list[int]
    truncated: bool
    """The row did not fit: text or at least the end token was cut off."""


def encode(prompt: Prompt, row: Row, *, max_length: int, loss_on: Literal["answer", "all"]) -> Encoded:
    """Tokenise prompt and output as one string, cut it on the right, append the end token where there is room.

    `max_length` counts the beginning-of-text token. With `loss_on="answer"` a token is labelled if and only if it
    covers at least one character of the output (in a conversation: of one of the assistant's turns, end token
    included); characters are found through the tokenizer's offsets. The published script counts the tokens of the
    template with an empty output instead, which is off by one wherever a token merges the template's last spaces with
    the output's first character: that token is in no tokenisation of the template alone. Here such a token belongs to
    the answer, since it decides the first answer character. The end token is always labelled; a chat template that ends
    turns with a token of its own ends the row with it.

    Raises UserError if the tokenizer has no offsets or no end token.
    """
    tokenizer = prompt.tokenizer
    if not tokenizer.is_fast:
        raise UserError(f"tokenizer {type(tokenizer).__name__}: no character offsets; use a fast tokenizer")
    if tokenizer.eos_token_id is None:
        raise UserError(f"tokenizer {type(tokenizer).__name__}: no end token; set eos_token in tokenizer_config.json")
    whole = prompt.training_tokens(row)
    ids = whole.ids if whole.ended else [*whole.ids, tokenizer.eos_token_id]
    answer = whole.answer if whole.ended else [*whole.answer, True]
    labels = [i if loss_on == "all" or written else IGNORED for i, written in zip(ids, answer, strict=True)]
    return Encoded(input_ids=ids[:max_length], labels=labels[:max_length], truncated=len(ids) > max_length)


def encode_rows(
    prompt: Prompt, rows: Sequence[Row], *, max_length: int, loss_on: Literal["answer", "all"]
) -> tuple[list[Encoded], DataUse]:
    """Encode rows and count what happened to them; a row whose answer was cut off entirely is dropped.

    Truncated rows, mean tokens and answer share are those of the rows kept. Raises UserError if none is kept.
    """
    if not rows:
        raise UserError("no rows to encode: the data file is empty; give the task rows")
    kept: list[Encoded] = []
    answer_tokens = 0
    for row in rows:
        # Kept rows are decided on the answer even if the prompt is in the loss: a prompt alone teaches no answer.
        answer = encode(prompt, row, max_length=max_length, loss_on="answer")
        labelled = _labelled(answer)
        if labelled:
            answer_tokens += labelled
            kept.append(
                answer if loss_on == "answer" else Encoded(answer.input_ids, list(answer.input_ids), answer.truncated)
            )
    if not kept:
        shortest = min(len(prompt.evaluation_tokens(row)) for row in rows)
        raise UserError(
            f"max_length {max_length}: no answer token is left in any of {len(rows)} rows; the shortest prompt alone "
            f"has {shortest} tokens, so raise recipe.max_length well above that"
        )
    tokens = sum(len(row.input_ids) for row in kept)
    return kept, DataUse(
        train_rows=len(kept),
        truncated_rows=sum(row.truncated for row in kept),
        dropped_rows=len(rows) - len(kept),
        mean_tokens=tokens / len(kept),
        answer_tokens_share=answer_tokens / tokens,
    )


def check_ids(rows: Iterable[Sequence[int]], *, tokenizer: Any, embedding: nn.Module | None) -> None:
    """Refuse token ids that the model's embedding has no row for, as added tokens without a resized embedding have.

    Raises UserError naming the token and both numbers.
    """
    if not isinstance(embedding, nn.Embedding):
        return
    highest = max((max(ids) for ids in rows if len(ids)), default=0)
    if highest >= embedding.num_embeddings:
        raise UserError(
            f"the token {tokenizer.convert_ids_to_tokens(highest)!r} has id {highest}, and the model's embedding has "
            f"{embedding.num_embeddings} rows; take rows, or a prompt, without it, or the tokenizer of this model"
        )


def collate(rows: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """Batch of `input_ids`, `attention_mask`, `labels`, each int64 of shape (rows, longest row).

    Padding goes to the right, although the published collator pads left. In training both give the same loss: padding
    is masked out of attention and loss, and rotary attention depends only on the distance between two tokens, not on
    where a row starts. Right padding keeps positions 0, 1, 2, ... for models with learned positions too, and needs no
    mask under causal attention for the tokens that count.
    """
    longest = max(len(row.input_ids) for row in rows)
    gaps = [longest - len(row.input_ids) for row in rows]
    return {
        "input_ids": torch.tensor([row.input_ids + [pad_id] * gap for row, gap in zip(rows, gaps, strict=True)]),
        "attention_mask": torch.tensor([[1] * (longest - gap) + [0] * gap for gap in gaps]),
        "labels": torch.tensor([row.labels + [IGNORED] * gap for row, gap in zip(rows, gaps, strict=True)]),
    }


def _labelled(row: Encoded) -> int:
    return sum(label != IGNORED for label in row.labels)
