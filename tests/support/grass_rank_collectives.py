"""What ranks of GRASS send each other: which gradients, how many bytes, in which order they are summed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from grass_rank_runs import built, half, train_parts
from torch import Tensor, nn

from grass import distributed as under_test


@contextmanager
def counted() -> Iterator[list[tuple[torch.dtype, int]]]:
    """Dtype and bytes of every tensor that is all-reduced."""
    calls: list[tuple[torch.dtype, int]] = []
    plain = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **options: Any) -> Any:
        calls.append((tensor.dtype, tensor.nbytes))
        return plain(tensor, *args, **options)

    dist.all_reduce = all_reduce
    try:
        yield calls
    finally:
        dist.all_reduce = plain


def traffic(rank: int) -> dict[str, Any]:
    """What one step in mid-period reduces, after one backward pass and after three."""
    found = {}
    for count in (1, 3):
        model, opt = built([rank], accumulation_steps=count)
        train_parts(model, opt, [rank], 0, 1)
        for seed in range(count):
            model(**half(seed, rank)).loss.backward()
        outside = {"embedding": model.model.embed_tokens, "norm": model.model.norm, "head": model.lm_head}
        awake = [p for part in outside.values() for p in part.parameters()]
        awake += [p for layer in opt.active for p in opt.layer_parameters[layer]]
        with counted() as calls:
            opt.step()
        found[f"{count} backward passes"] = {
            "calls": calls,
            "awake": sum(p.nbytes for p in awake),
            "tensors": len(awake),
            "model": sum(p.nbytes for p in model.parameters()),
        }
    return found


SIZES = (1, 5, 60, 64, 65, 1, 130, 3, 64, 7)
"""Entries of the gradients of `mixed_gradients`; a bucket has 64 fp32 or 128 bf16 entries."""


def mixed_gradients(rank: int) -> list[Tensor]:
    """Of two dtypes in turn, some stored column by column, one of a slice."""
    generator = torch.Generator().manual_seed(rank)
    found = []
    for number, size in enumerate(SIZES):
        dtype = torch.bfloat16 if number % 2 else torch.float32
        found.append(torch.randn(size, generator=generator).to(dtype))
    found.append(torch.randn(8, 6, generator=generator).t())
    found.append(torch.randn(40, 40, generator=generator).t())
    found.append(torch.randn(6, 6, generator=generator)[:, ::2])
    return found


def averaged_gradients(rank: int) -> dict[str, Any]:
    under_test.BUCKET_BYTES = 256
    gradients = mixed_gradients(rank)
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    with counted() as calls:
        under_test.average_gradients(parameters)
    # in place: a gradient that is a view of something stays one
    assert all(p.grad is g for p, g in zip(parameters, gradients, strict=True))
    return {"gradients": [g.clone() for g in gradients], "calls": calls}


def averages(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    dtypes = (torch.float32, torch.float64)
    return [
        under_test.average(torch.randn(size, generator=generator).to(dtype) * 10 ** (3 * rank))
        for size in (1, 2, 3, 4, 33, 1000, 100003)
        for dtype in dtypes
    ]
