"""The rows of each step: they depend on seed and step alone, so every method sees the same rows in the same order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from grass.loss import NO_TARGET
from harness.inputs.tokens import Encoded, collate
from harness.step.loss import label_tokens, loss_of

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
    """Micro-batches of every optimizer step, on the run's device.

    Of several processes, each takes every `count`-th micro-batch of a step, so that all together take the rows that one
    would take.

    Args:
        rows: of training.
        batch_size: rows in a step.
        micro_batch_size: rows in a forward pass.
        seed: of the order.
        pad_id: any token.
        device: where the batches go.
        share: this process's rank and the number of processes.

    Raises:
        ValueError: a step's micro-batches cannot be shared evenly.
    """

    def __init__(
        self,
        rows: Sequence[Encoded],
        *,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        pad_id: int,
        device: str,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self._rows, self._pad_id, self._device = rows, pad_id, device
        self._batch, self._micro = batch_size, micro_batch_size
        self._rank, self._ranks = share
        if batch_size // micro_batch_size % self._ranks:
            raise ValueError(f"{self._ranks} processes cannot share {batch_size // micro_batch_size} micro-batches")
        self._order = RowOrder(len(rows), seed)
        self._calibration = RowOrder(len(rows), seed, CALIBRATION_STREAM)

    def step(self, step: int) -> list[dict[str, Tensor]]:
        """Micro-batches of optimizer step `step` that this process takes."""
        return [self._collate(numbers) for numbers in self._shared(step)]

    def rows_of(self, step: int) -> list[int]:
        """Numbers of all rows of step `step`, whichever process takes them."""
        return self._order.rows(step * self._batch, self._batch)

    def own_numbers(self, step: int) -> list[int]:
        """Numbers of the rows of step `step` that this process takes."""
        return [number for numbers in self._shared(step) for number in numbers]

    def _shared(self, step: int) -> list[list[int]]:
        chosen, stride = self.rows_of(step), self._micro * self._ranks
        return [chosen[i : i + self._micro] for i in range(self._rank * self._micro, self._batch, stride)]

    def label_tokens(self, step: int) -> int:
        """Label tokens in all rows of step `step`."""
        return sum(label != NO_TARGET for number in self.rows_of(step) for label in self._rows[number].labels[1:])

    def calibration_numbers(self, count: int) -> range:
        """Numbers of this process's share of the first `count` calibration batches; all where they cannot be shared."""
        return range(count) if count % self._ranks else range(self._rank, count, self._ranks)

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
        chunked: as in training (`Recipe.chunked_loss`).
    """

    def __init__(self, batches: Batches, *, autocast: bool = False, chunked: bool = False) -> None:
        self._batches, self._loss = batches, loss_of(chunked=chunked, autocast=autocast)

    def batches(self, count: int) -> Iterator[Mapping[str, Tensor]]:
        """The first `count` calibration batches, or this process's share of them."""
        return (self._batches.calibration_batch(number) for number in self._batches.calibration_numbers(count))

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """Mean loss per label token."""
        return self._loss(model, batch) / label_tokens(batch)


def fixed_batches(rows: Sequence[Encoded], *, size: int, pad_id: int, device: str) -> list[dict[str, Tensor]]:
    """All `rows` sorted by length, `size` per batch: for what is measured and not trained on."""
    ordered = sorted(rows, key=lambda row: len(row.input_ids))
    return [on_device(collate(ordered[i : i + size], pad_id), device) for i in range(0, len(ordered), size)]


def on_device(batch: dict[str, Tensor], device: str) -> dict[str, Tensor]:
    """The same batch on `device`."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}
