"""Data parallelism for plain modules: `step` averages the active layers' gradients, and importance, over ranks.

DistributedDataParallel builds its reducer for the parameters that require gradients when it wraps the model; changing
`requires_grad` afterwards makes ranks diverge without an error. Here every rank of the default process group holds the
plain module, draws the same layers from the same generator, and averages the gradients of those layers inside `step`. R
ranks compute what one process does that accumulates their R micro-batches. For the training loop this means:

- Every rank counts the same, as under DistributedDataParallel: if losses are means over unequal numbers of tokens, the
  caller must weight them.
- Gradients are averaged once a step, however many backward passes it has; there is no `no_sync()`.
- Clip with the option `max_grad_norm`. `clip_grad_norm_` before `step()` sees only the rank's own gradient: each rank
  would scale by a different factor, and the average would not be the clipped average.
- Nothing is broadcast. If ranks do not hold the same weights at the first step, `step` raises an error.
- State dicts are the same on every rank: save one, load it on all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 32 * 2**20
"""Small gradients are reduced together up to this many bytes; a larger one is reduced in place."""
COMPARED = 64
"""Values that `check_agreement` can compare at once."""
CHECKSUM_ENTRIES = 1 << 22
"""Weights summed at once in a checksum, so that converting them to 64 bits takes 32 MiB at most."""


def ranks() -> int:
    """Processes of the default group; 1 where none was initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all ranks; every rank must pass the same parameters.

    If a parameter has a gradient on another rank only, it counts as zero here. If it has none on any rank, it gets
    none, so that it does not decay. Sums are taken in the gradients' own dtype.
    """
    count = ranks()
    if count == 1:
        return
    device = parameters[0].device
    here = [p.grad is not None for p in parameters]
    if all(here):
        # created on the device and not read back, so the host does not wait for backward
        found = torch.ones(len(here), dtype=torch.uint8, device=device)
    else:
        found = torch.tensor(here, dtype=torch.uint8, device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    anywhere = here if all(here) else found.tolist()
    gradients: dict[torch.dtype, list[Tensor]] = {}
    for parameter, graded in zip(parameters, anywhere, strict=True):
        if graded:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for alike in gradients.values():
        for bucket in _buckets(alike):
            _average(bucket, count)


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for gradient in gradients:
        if bucket and size + gradient.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    yield bucket


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
    """Mean over all ranks, bitwise equal on each: all ranks must draw from the same probabilities.

    It is equal because `torch.distributed.all_reduce` leaves its result "bitwise identical in all processes" (torch's
    documentation), whatever the order of summation.
    """
    count = ranks()
    if count > 1:
        values = values.clone()
        dist.all_reduce(values)
        values.div_(count)
    return values


def check_agreement(values: Mapping[str, object], device: torch.device, *, mend: str) -> None:
    """Raise an error if ranks differ in values that must be the same on all.

    It uses one collective, whose shape does not depend on what is compared. So ranks that compare different sets of
    values get the error too, instead of waiting for each other.

    Args:
        values: values that must be the same, by their name in the message; compared as text, `COMPARED` at most.
        device: a device on which collectives of the default group work.
        mend: what the user can do about a difference; the end of the message.

    Raises:
        RuntimeError: on every rank, if the values differ on any two.
    """
    if ranks() == 1:
        return
    digests = [_digest(f"{name}={value}") for name, value in values.items()]
    digests += [0] * (COMPARED - len(digests))
    # the largest digest, and minus the smallest: their sum is 0 if all are equal
    ends = torch.tensor([digests, [-d for d in digests]], dtype=torch.int64, device=device)
    dist.all_reduce(ends, op=dist.ReduceOp.MAX)
    differing = [item for item, spread in zip(values.items(), ends.sum(0).tolist(), strict=False) if spread]
    if differing:
        listed = ", ".join(f"{name} (here {value})" for name, value in differing)
        raise RuntimeError(f"ranks differ in {listed}: {mend}")


def check_ranks(
    facts: Mapping[str, object], model: nn.Module, groups: Sequence[Mapping[str, Any]], *, weights: bool
) -> None:
    """Raise an error if ranks would train different layers or compute with different values.

    Args:
        facts: further values that must be the same on all ranks.
        model: its parameters must be equal in number and total size on all ranks.
        groups: parameter groups; their learning rates must be the same (a scheduler may depend on what a rank
            measures).
        weights: whether to check as well that the weights are bitwise equal; this reads all of them.

    Raises:
        RuntimeError: on every rank, if any two differ.
    """
    if ranks() == 1:
        return
    parameters = list(model.parameters())
    compared = {
        **facts,
        "learning rates": sorted({float(group["lr"]) for group in groups}),
        "parameters": f"{len(parameters)} with {sum(p.numel() for p in parameters):,} entries",
    }
    if weights:
        compared["weights"] = f"checksum {checksum(parameters):x}"
    mend = "give Grass the same model, weights, options, seed and state dict on every rank"
    check_agreement(compared, parameters[0].device, mend=mend)


def _digest(text: str) -> int:
    """56 bits, so that the difference of two digests fits in an int64."""
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest(), "big")


def checksum(parameters: Iterable[Tensor]) -> int:
    """Checksum of the bits of all entries; blocks until the device has computed it.

    Equal parameters have equal checksums on every kind of device: integers are summed, so the order does not matter.
    """
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    total = sum(
        number * int(part.sum(dtype=torch.int64))
        for number, p in enumerate(parameters, start=1)
        for part in p.detach().reshape(-1).view(integers[p.element_size()]).split(CHECKSUM_ENTRIES)
    )
    return total % (1 << 64)
