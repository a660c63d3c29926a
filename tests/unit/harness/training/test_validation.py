"""Validation needs little memory, goes on where it ran out of it, and finds the same loss however rows are batched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grass_tiny import llama
from harness.inputs.tokens import Encoded
from harness.step import loss as losses
from harness.training import validation
from harness.training.validation import losses_of_rows, mean_loss


def rows() -> list[Encoded]:
    """Nine rows of 3 to 11 tokens, the longest in the middle, the first two tokens without a label."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for length in (3, 5, 7, 9, 11, 10, 8, 6, 4):
        ids = torch.randint(1, 32, (length,), generator=generator).tolist()
        made.append(Encoded(ids, [-100, -100, *ids[2:]], truncated=False))
    return made


def by_hand(model: Any, row: Encoded) -> tuple[float, int]:
    logits = model(input_ids=torch.tensor([row.input_ids])).logits[0, :-1].double().log_softmax(1)
    wanted = [(place, label) for place, label in enumerate(row.labels[1:]) if label != -100]
    return -sum(float(logits[place, label].detach()) for place, label in wanted), len(wanted)


@pytest.mark.parametrize("tokens", [1, 24, 1000])
def test_every_row_has_its_own_loss_however_rows_are_batched(tokens: int) -> None:
    model = llama().eval()
    found, true = losses_of_rows(model, rows(), tokens_at_once=tokens, pad_id=0), [by_hand(model, r) for r in rows()]
    assert [t for _, t in found] == [t for _, t in true]
    assert [n for n, _ in found] == pytest.approx([n for n, _ in true], rel=1e-5)
    mean = sum(n for n, _ in true) / sum(t for _, t in true)
    model.train()
    assert mean_loss(model, rows(), tokens_at_once=tokens, pad_id=0) == pytest.approx(mean, rel=1e-5)
    assert model.training


def sizes(monkeypatch: pytest.MonkeyPatch, *, room: int | None = None) -> list[tuple[int, int]]:
    """(rows, length) of each forward pass from here on; one with more than `room` tokens runs out of memory."""
    seen: list[tuple[int, int]] = []
    usual = losses.row_losses

    def watched(model: Any, batch: Any, **how: Any) -> Any:
        seen.append(tuple(batch["input_ids"].shape))
        if room is not None and batch["input_ids"].numel() > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return usual(model, batch, **how)

    monkeypatch.setattr(validation, "row_losses", watched)
    return seen


def test_tokens_are_bounded_and_not_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = sizes(monkeypatch)
    losses_of_rows(llama().eval(), rows(), tokens_at_once=24, pad_id=0)
    assert max(count * length for count, length in seen) <= 24
    assert sum(count for count, _ in seen) == 9
    assert max(count for count, _ in seen) > 2, "short rows go together"


def test_where_memory_runs_out_it_goes_on_with_half_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama().eval()
    alone = losses_of_rows(model, rows(), tokens_at_once=1, pad_id=0)
    seen, halved = sizes(monkeypatch, room=25), []
    found = losses_of_rows(model, rows(), tokens_at_once=1000, pad_id=0, on_halved=halved.append)
    assert [n for n, _ in found] == pytest.approx([n for n, _ in alone], rel=1e-5)
    assert seen[0] == (9, 11)
    assert halved == [49, 22]
    assert sum(count * length > 25 for count, length in seen) == 2, "what failed once is not tried again"


def test_a_row_that_does_not_fit_alone_is_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes(monkeypatch, room=6)
    with pytest.raises(torch.OutOfMemoryError):
        losses_of_rows(llama().eval(), rows(), tokens_at_once=1000, pad_id=0)


def test_an_error_of_another_kind_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("index out of range")

    monkeypatch.setattr(validation, "row_losses", broken)
    with pytest.raises(RuntimeError, match="index out of range"):
        losses_of_rows(llama().eval(), rows(), tokens_at_once=1000, pad_id=0)


def test_rows_are_taken_alone_where_the_model_makes_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama().eval()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    seen = sizes(monkeypatch)
    found = losses_of_rows(model, rows(), tokens_at_once=1000, pad_id=0)
    assert {count for count, _ in seen} == {1}
    assert [n for n, _ in found] == pytest.approx([by_hand(model, r)[0] for r in rows()], rel=1e-5)
