"""What tensors are alive: the harness's own count of a method's state, which the method cannot word differently."""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def storage_bytes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Size of every distinct storage behind `tensors`, by address."""
    found = {}
    for tensor in tensors:
        if tensor.layout is torch.strided and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def live_bytes_outside(module: nn.Module) -> int:
    """Bytes of all live tensors of this process that are neither parameters nor buffers of `module`.

    Gradients count, since a gradient alive between two steps is memory that the method holds. Found through Python's
    garbage collector: tensors that only C++ knows (a graph not yet freed) are not seen.
    """
    gc.collect()
    # type(), not isinstance(): lazy objects of other libraries answer isinstance by importing half the world
    alive = storage_bytes(o for o in gc.get_objects() if issubclass(type(o), Tensor))
    for address in storage_bytes([*module.parameters(), *module.buffers()]):
        alive.pop(address, None)
    return sum(alive.values())


def fingerprint(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Two position-weighted integer sums a tensor over its raw bits, computed on its own device.

    Equal bits give equal fingerprints; tensors that differ in any entry differ here but for a chance of about 2**-64.
    """
    parts: list[int] = []
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(-1).view(_INTEGER[tensor.element_size()])
        plain = torch.zeros((), dtype=torch.int64, device=bits.device)
        weighted = torch.zeros((), dtype=torch.int64, device=bits.device)
        for chunk_number, chunk in enumerate(bits.split(_CHUNK)):
            wide = chunk.to(torch.int64)
            position = torch.arange(len(chunk), device=bits.device) + chunk_number * _CHUNK
            plain += wide.sum()
            weighted += (wide * (position * 0x9E3779B1 + 1)).sum()
        parts += [int(plain), int(weighted)]
    return tuple(parts)


_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22
