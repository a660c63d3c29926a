"""Several processes that train one run together, one a device: what they tell each other beside gradients.

Each takes its share of a step's micro-batches (`harness.training.batches`), the method averages the gradients, and rank
0 alone writes. `harness.training.launching` starts them. In one process everything here is free.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grass.distributed import checksum, ranks
from harness.measuring.energy import Joules, together
from harness.records.run import Check

T = TypeVar("T")


@contextmanager
def group(device: Literal["cpu", "cuda"]) -> Iterator[None]:
    """Join the processes that torchrun started, as its environment variables say: by gloo on a CPU, else by NCCL.

    After an error the group is left as it is: the others may be waiting in it, and torchrun ends them.
    """
    if device == "cpu" and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # they are on one machine
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    yield
    dist.destroy_process_group()


def rank() -> int:
    """Of this process; 0 where it is alone."""
    return dist.get_rank() if ranks() > 1 else 0


def gathered(value: T) -> list[T]:
    """What every process passed, by rank; all must call it."""
    if ranks() == 1:
        return [value]
    found: list[T | None] = [None] * ranks()
    dist.all_gather_object(found, value)
    return found  # type: ignore[return-value]


def signal_of_any(asked: int | None) -> int | None:
    """The first signal that any process was sent: all must stop after the same step."""
    return next((number for number in gathered(asked) if number is not None), None)


@dataclass(frozen=True)
class Share:
    """What one process did of an optimizer step; of a `total`, what all did."""

    loss: float
    """Of its micro-batches, nats per label token of the step times the number of processes; of a total, their mean."""
    grad_norm: float | None
    """Before clipping, of the averaged gradient."""
    tokens: int
    total_tokens: int
    """The same with padding."""
    seconds: float
    energy: Joules
    """Of its card; of a total, of all cards."""
    rows: Sequence[int]
    """Numbers of the training rows it took."""

    @property
    def finite(self) -> bool:
        """Whether loss and gradient norm are numbers."""
        return math.isfinite(self.loss) and (self.grad_norm is None or math.isfinite(self.grad_norm))


def share_of(
    batches: Sequence[Mapping[str, Tensor]],
    *,
    loss: float,
    grad_norm: float | None,
    seconds: float,
    energy: Joules,
    rows: list[int],
) -> Share:
    """What this process did of a step, whose micro-batches were `batches`."""
    return Share(
        loss=loss,
        grad_norm=grad_norm,
        tokens=sum(int(batch["attention_mask"].sum()) for batch in batches),
        total_tokens=sum(batch["attention_mask"].numel() for batch in batches),
        seconds=seconds,
        energy=energy,
        rows=rows,
    )


def total(share: Share, *, step: int, rows: Sequence[int]) -> Share:
    """The whole step, from the shares of all processes; `rows` are those that it is to have.

    Raises:
        RuntimeError: together they took other rows.
    """
    shares = gathered(share)
    taken = sorted(number for one in shares for number in one.rows)
    if taken != sorted(rows):
        raise RuntimeError(f"at step {step} the processes together took the rows {taken}, not {sorted(rows)}")
    return Share(
        loss=sum(one.loss for one in shares) / len(shares),
        grad_norm=next((one.grad_norm for one in shares if not one.finite), shares[0].grad_norm),
        tokens=sum(one.tokens for one in shares),
        total_tokens=sum(one.total_tokens for one in shares),
        seconds=max(one.seconds for one in shares),
        energy=together([one.energy for one in shares]),
        rows=taken,
    )


def seed_step(seed: int, step: int) -> None:
    """Of several processes, give each random numbers of its own in this step (dropout), the same after a resume."""
    if ranks() > 1:
        # the generators take 64 bits; the numbers are spread over them, so that neighbours do not meet
        torch.manual_seed(hash((seed, step, rank())) % (1 << 63))


def weights_agree(module: nn.Module) -> bool:
    """Whether all processes hold the same weights, to the bit; reads all of them."""
    return ranks() == 1 or len(set(gathered(checksum(module.parameters())))) == 1


def agreement(*, compared: int, apart_at: Sequence[int]) -> list[Check]:
    """The check of a run's weights under several processes; none where there was one alone.

    Args:
        compared: times that weights were compared.
        apart_at: steps after which they differed.
    """
    if not compared and ranks() == 1:
        return []
    return [
        Check(
            name="all processes hold the same weights",
            promised="at every period's end, bit for bit",
            observed=f"they differ after step {apart_at[0]}" if apart_at else f"so, {compared} times",
            ok=compared > 0 and not apart_at,
        )
    ]


@dataclass(frozen=True)
class Peaks:
    """Peak memory of one process in training, bytes; None where it is not known."""

    host: int | None
    device_allocated: int | None
