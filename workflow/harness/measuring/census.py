"""Counts live tensors: the harness's own figure for a method's state, independent of what the method reports."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from contextlib import suppress

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


def state_bytes(optimizer: torch.optim.Optimizer | None, *, counts: Callable[[Tensor], bool]) -> int:
    """Bytes of an optimizer's states, each storage counted once; works on fake and on real tensors.

    Args:
        optimizer: None has no states.
        counts: whether a tensor of the states counts.
    """
    held: dict[int, int] = {}
    for tensor in state_tensors(optimizer):
        if counts(tensor):
            with suppress(NotImplementedError):  # a tensor without a storage holds nothing
                storage = tensor.untyped_storage()
                held[storage._cdata] = storage.nbytes()
    return sum(held.values())


def state_tensors(optimizer: torch.optim.Optimizer | None) -> list[Tensor]:
    """All tensors in an optimizer's state."""
    values = [] if optimizer is None else [v for state in optimizer.state.values() for v in state.values()]
    return [value for value in values if isinstance(value, Tensor)]


def begin_census() -> None:
    """Count only objects created from here on: everything alive now is hidden from the garbage collector.

    This also cuts the time of a count from half a second to milliseconds. The next `begin_census` undoes it.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


def live_bytes_outside(module: nn.Module) -> int:
    """Bytes of tensors created since `begin_census` and still alive, without parameters and buffers of `module`.

    Gradients count, since a gradient alive between two steps is memory that the method holds. Tensors are found
    through Python's garbage collector: a tensor that only C++ refers to (in a graph not yet freed) is not seen.
    """
    gc.collect()
    # type(), not isinstance(): isinstance makes the lazy objects of other libraries import large packages
    alive = storage_bytes(o for o in gc.get_objects() if issubclass(type(o), Tensor))
    # a gradient that Python code never accessed has no Python object yet
    alive |= storage_bytes(p.grad for p in module.parameters() if p.grad is not None)
    for address in storage_bytes([*module.parameters(), *module.buffers()]):
        alive.pop(address, None)
    return sum(alive.values())


def fingerprint(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Two position-weighted integer sums a tensor over its raw bits, computed on its own device.

    Equal bits give equal fingerprints; different tensors get the same one with a probability of about 2**-64.
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
