"""Data parallelism for plain modules: gradients of active layers are averaged inside `step`, and so is importance.

DistributedDataParallel builds its reducer for the parameters that require gradients when it wraps the model; switching
them afterwards makes ranks diverge without an error. Here every rank holds the plain module, draws the same layers from
the same generator, and averages what the layers' gradients are at that moment.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 32 * 2**20
"""Small gradients are reduced together up to this many bytes; a larger one is reduced in place."""


def ranks() -> int:
    """Processes of the default group; 1 where none was initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all ranks; the parameters must be the same ones on each.

    A parameter without gradient on this rank, but with one on another, counts as zero here; one without gradient on
    every rank keeps none, so that it does not decay.
    """
    count = ranks()
    if count == 1:
        return
    found = torch.tensor([int(p.grad is not None) for p in parameters], device=parameters[0].device)
    dist.all_reduce(found)
    bucket: list[Tensor] = []
    size = 0
    for parameter, somewhere in zip(parameters, found.tolist(), strict=True):
        if not somewhere:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient = parameter.grad
        if bucket and (size + gradient.nbytes > BUCKET_BYTES or gradient.dtype != bucket[0].dtype):
            _average(bucket, count)
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        _average(bucket, count)


def _average(gradients: Sequence[Tensor], count: int) -> None:
    if len(gradients) == 1 and gradients[0].is_contiguous():
        dist.all_reduce(gradients[0])
        gradients[0].div_(count)
        return
    together = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(together)
    together.div_(count)
    for gradient, part in zip(gradients, together.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def average(values: Tensor) -> Tensor:
    """Mean over all ranks, equal to the last bit on each."""
    count = ranks()
    if count > 1:
        values = values.clone()
        dist.all_reduce(values)
        values.div_(count)
        # a reduction may round differently on different ranks; what is drawn from must not
        dist.broadcast(values, src=0)
    return values


def check_agreement(seed: int, draw: Sequence[int], device: torch.device) -> None:
    """All ranks must have drawn the same layers.

    Raises:
        RuntimeError: they did not: seeds or options differ.
    """
    if ranks() == 1:
        return
    mine = torch.tensor([seed, *draw], dtype=torch.int64, device=device)
    first = mine.clone()
    dist.broadcast(first, src=0)
    differs = torch.tensor([int(not torch.equal(mine, first))], device=device)
    dist.all_reduce(differs)
    if int(differs):
        raise RuntimeError(
            f"ranks would train different layers (here seed {seed}, layers {list(draw)}): "
            "give Grass the same seed and options on every rank"
        )
