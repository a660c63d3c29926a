"""The rows of each step: they depend on seed and step alone, so every method sees the same rows in the same order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from harness.inputs.tokens import Encoded, collate
from harness.step.loss import label_tokens, token_loss

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

CALIBRATION_STREAM = 1
TRAINING_STREAM = 0


class RowOrder:
    """Seeded epochs over `count` rows: every row once an epoch, a new order each epoch, no row left over."""

    def __init__(self, count: int, seed: int, stream: int = TRAINING_STREAM) -> None:
        self.count, self._key = count, (seed, stream)
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def rows(self, first: int, size: int) -> list[int]:
        """Row numbers at positions `first` to `first + size` (exclusive) of the endless sequence."""
        return [self._at(place) for place in range(first, first + size)]

    def _at(self, place: int) -> int:
        epoch, offset = divmod(place, self.count)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([*self._key, epoch]).permutation(self.count)
        return int(self._order[offset])


class Batches:
    """Micro-batches of every optimizer step, on the run's device."""

    def __init__(
        self, rows: Sequence[Encoded], *, batch_size: int, micro_batch_size: int, seed: int, pad_id: int, device: str
    ) -> None:
        self._rows, self._pad_id, self._device = rows, pad_id, device
        self._batch, self._micro = batch_size, micro_batch_size
        self._order = RowOrder(len(rows), seed)
        self._calibration = RowOrder(len(rows), seed, CALIBRATION_STREAM)

    def step(self, step: int) -> list[dict[str, Tensor]]:
        """The micro-batches of optimizer step `step`."""
        chosen = self._order.rows(step * self._batch, self._batch)
        return [self._collate(chosen[i : i + self._micro]) for i in range(0, self._batch, self._micro)]

    def calibration_batch(self, number: int) -> dict[str, Tensor]:
        """Calibration batch `number`: one micro-batch of training rows, in a separate order."""
        return self._collate(self._calibration.rows(number * self._micro, self._micro))

    def _collate(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        return on_device(collate([self._rows[n] for n in numbers], self._pad_id), self._device)


class CalibrationBatches:
    """`baselines.method.Calibration` over a run's batches; it does not change which rows training sees.

    Args:
        batches: of the run.
        autocast: as in training (`Recipe.autocast`).
    """

    def __init__(self, batches: Batches, *, autocast: bool = False) -> None:
        self._batches, self._autocast = batches, autocast

    def batches(self, count: int) -> Iterator[Mapping[str, Tensor]]:
        """The first `count` calibration batches."""
        return (self._batches.calibration_batch(number) for number in range(count))

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean loss per label token."""
        return token_loss(model, batch, autocast=self._autocast) / label_tokens(batch)


def fixed_batches(rows: Sequence[Encoded], *, size: int, pad_id: int, device: str) -> list[dict[str, Tensor]]:
    """All `rows` sorted by length, `size` per batch: for what is measured and not trained on."""
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    return [on_device(collate(ordered[i : i + size], pad_id), device) for i in range(0, len(ordered), size)]


def on_device(batch: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """The same batch on `device`."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
