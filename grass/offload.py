"""Optimizer states of sleeping layers live on the host and come back when their layer is drawn again."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

HOST = torch.device("cpu")


def send_to_host(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> int:
    """Move the moments of `parameters` to host memory; values and step counts stay. Returns the bytes moved."""
    return _move(optimizer, parameters, HOST)


def fetch_to_device(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> int:
    """Move the moments of `parameters` to the device of their parameter. Returns the bytes moved."""
    return _move(optimizer, parameters, None)


def drop(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Forget the moments and step counts of `parameters`."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def _move(optimizer: Optimizer, parameters: Iterable[nn.Parameter], device: torch.device | None) -> int:
    moved = 0
    for parameter in parameters:
        target = device or parameter.device
        # .get: a defaultdict would grow an empty state for a parameter that never trained
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor) and value.device != target:
                optimizer.state[parameter][key] = value.to(target)
                moved += value.numel() * value.element_size()
    return moved
