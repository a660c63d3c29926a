"""Counts live tensors: the harness's own figure for a method's state, independent of what the method reports."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def storage_bytes(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Size of every distinct storage behind `tensors`, by address."""
    found = {}
    for tensor in (plain for given in tensors for plain in plain_tensors(given)):
        # a compiler may leave fake tensors behind, which hold nothing
        if tensor.layout is torch.strided and tensor.device.type != "meta" and type(tensor) is not FakeTensor:
            storage = tensor.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold a tensor's values: itself, or those that it wraps (quantised weights and states)."""
    if hasattr(type(tensor), "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
        for name in names:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor


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
    """All tensors in an optimizer's state, those in lists (L-BFGS) and in objects (GaLore's projector) too."""
    return [] if optimizer is None else [t for state in optimizer.state.values() for t in tensors_in(state)]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Tensors in a value of an optimizer's state: itself, in containers, or attributes of an object in it."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (t for inner in value.values() for t in tensors_in(inner))
    elif isinstance(value, list | tuple):
        yield from (t for inner in value for t in tensors_in(inner))
    elif hasattr(value, "__dict__") and not isinstance(value, type | nn.Module):
        yield from (t for inner in vars(value).values() if isinstance(inner, Tensor | list) for t in tensors_in(inner))


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
    """Two integer sums a tensor over the 64-bit words of its raw bits, one of them weighted by place.

    Computed on the tensors' own device, in one pass over them; the host waits once for each device. Equal bits give
    equal fingerprints; different tensors get the same one with a probability of about 2**-64.
    """
    sums = [torch.stack([_word_sums(p) for p in plain_tensors(t.detach())]).sum(0) for t in tensors]
    on_host: dict[torch.device, list[list[int]]] = {}
    for device in {both.device for both in sums}:
        on_host[device] = torch.stack([both for both in sums if both.device == device]).tolist()
    following = {device: iter(numbers) for device, numbers in on_host.items()}
    return tuple(number for both in sums for number in next(following[both.device]))


def _word_sums(tensor: Tensor) -> Tensor:
    flat = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)
    flat = flat.view(_INTEGER[flat.element_size()])
    word = 8 // flat.element_size()
    plain = torch.zeros((), dtype=torch.int64, device=flat.device)
    weighted = torch.zeros_like(plain)
    for number, part in enumerate(flat.split(_CHUNK * word)):
        whole = len(part) // word * word
        if whole < len(part):
            part = torch.cat([part, part.new_zeros(whole + word - len(part))])
        # a view that begins in mid-word cannot be read in words where it lies
        aligned = part if part.storage_offset() % word == 0 else part.clone()
        words = aligned.view(torch.int64)
        plain += words.sum()
        if flat.device.type == "cpu":
            places = _first_places() if number == 0 else _places(np.arange(len(words)) + number * _CHUNK)
            weighted += torch.dot(torch.from_numpy(places[: len(words)]), words)
        else:  # which knows no product of integer vectors
            place = torch.arange(len(words), device=flat.device) + number * _CHUNK
            weighted += _places(place).mul_(words).sum()
    return torch.stack([plain, weighted])


def _places(numbers: Any) -> Any:
    """Factors of the words with these numbers, mixed, so that no sum over neighbours cancels; in place."""
    numbers += 1
    numbers *= 0x9E3779B97F4A7C1
    numbers ^= numbers >> 29
    return numbers


@cache
def _first_places() -> Any:
    """Of the first words of any tensor; kept as an array, since a tensor would count as the method's."""
    return _places(np.arange(_CHUNK))


_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20
"""Words read at once: the temporary tensors are of this length."""
