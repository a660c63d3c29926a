"""Bytes that an optimizer keeps, and how much of it belongs to parameters that are switched off."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from harness.measuring.census import plain_tensors, storage_bytes, tensors_in


@dataclass
class Kept:
    """One storage, and the pieces of it (offset and length, in bytes) that are state of some parameter."""

    nbytes: int
    awake: set[tuple[int, int]] = field(default_factory=set)
    asleep: set[tuple[int, int]] = field(default_factory=set)

    @property
    def sleeping_bytes(self) -> int:
        """All of it if nothing in it is awake: a view keeps its whole storage alive. Else the sleeping pieces."""
        if not self.asleep:
            return 0
        if not self.awake:
            return self.nbytes
        return min(self.nbytes, sum(length for _, length in self.asleep - self.awake))


def kept_by(optimizers: Iterable[torch.optim.Optimizer], own: Container[int]) -> dict[int, Kept]:
    """Storages, by address, of the optimizers' states and of parameters in their groups that are copies.

    Args:
        optimizers: an optimizer, and those that it keeps inside.
        own: ids of the model's parameters.
    """
    found: dict[int, Kept] = {}

    def add(tensor: Tensor, *, asleep: bool) -> None:
        for plain in plain_tensors(tensor):
            for address, nbytes in storage_bytes([plain]).items():
                kept = found.setdefault(address, Kept(nbytes))
                piece = (int(plain.storage_offset()) * plain.element_size(), plain.nbytes)
                (kept.asleep if asleep else kept.awake).add(piece)

    for optimizer in optimizers:
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if id(p) not in own):
            add(parameter, asleep=False)
        for parameter, state in optimizer.state.items():
            for tensor in tensors_in(state):
                if tensor.dim() > 0:  # step counts are no memory
                    sleeps = id(parameter) in own and not parameter.requires_grad
                    add(tensor, asleep=sleeps and tensor.device == parameter.device)
    return found


def totals(by_optimizer: Mapping[int, Mapping[int, Kept]]) -> tuple[int, int]:
    """Bytes in all, and those that sleep; a storage that several optimizers keep counts once."""
    merged: dict[int, Kept] = defaultdict(lambda: Kept(0))
    for found in by_optimizer.values():
        for address, kept in found.items():
            whole = merged[address]
            whole.nbytes = kept.nbytes
            whole.awake |= kept.awake
            whole.asleep |= kept.asleep
    return sum(k.nbytes for k in merged.values()), sum(k.sleeping_bytes for k in merged.values())
