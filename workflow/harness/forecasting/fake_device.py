"""A simulated device: the host that a forecast installs, and tensors without values.

`CountingHost` answers everything that our own code asks a device (see `grass.host`). `tensors_without_values` handles
the places where transformers and torch themselves read values. A forecast replaces no other code.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AttentionMaskInterface
from transformers.initialization import no_init_weights
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from grass.host import PIECE_ELEMENTS, Host
from grass.offload.arena import HostArena
from grass.offload.streams import NoStreams
from harness.forecasting.tracker import Tracker


class ForecastStreams(NoStreams):
    """A device with its own memory, counted by the tracker; copies to the host end as late as possible."""

    def __init__(self, device: torch.device, tracker: Tracker) -> None:
        super().__init__(device)
        self.apart = True
        self._tracker = tracker

    def allocate(self, elements: int, dtype: torch.dtype) -> Tensor:
        """A buffer for moments."""
        buffer = super().allocate(elements, dtype)
        self._tracker.mark("optimizer states", [buffer])
        return buffer

    def done(self, event: None) -> bool:
        """Always False: a copy that is still running keeps its buffer, which is the worst case for memory."""
        return False


class ForecastArena(HostArena):
    """Host memory without content, counted apart from device memory."""

    def __init__(self, tracker: Tracker, *, settle: Callable[[], None]) -> None:
        super().__init__(pin=False, settle=settle)
        self._tracker = tracker

    def take(self, elements: int, dtype: torch.dtype) -> Tensor:
        """Zeros of shape (2, elements)."""
        self.nbytes += 2 * elements * dtype.itemsize
        with self._tracker.on_host():
            return torch.zeros(2, elements, dtype=dtype)

    def release(self, block: Tensor) -> None:
        """Forget a block."""
        self.nbytes -= block.nbytes


class CountingHost(Host):
    """Simulates a GPU on a CPU: device memory is counted apart from host memory, and updates use a GPU's piece size.

    Args:
        tracker: counts the memory.
        capacity_bytes: memory of the card, by which `offload: auto` decides; with None it always offloads.
    """

    def __init__(self, tracker: Tracker, *, capacity_bytes: int | None = None) -> None:
        self.tracker, self._capacity_bytes = tracker, capacity_bytes

    def streams(self, device: torch.device) -> ForecastStreams:
        """A GPU's streams, whose copies are executed at once but keep their buffers as long as possible."""
        return ForecastStreams(device, self.tracker)

    def piece_elements(self, device: torch.device) -> int:
        """The piece size of a GPU."""
        return PIECE_ELEMENTS["other"]

    def allocated_bytes(self, device: torch.device) -> int:
        """Bytes alive on the device."""
        self.tracker.memory_was_read = True
        return self.tracker.now

    def peak_bytes(self, device: torch.device) -> int:
        """Highest number of bytes alive on the device so far."""
        return self.tracker.peak

    def obtainable_bytes(self, device: torch.device) -> int:
        """The card's memory; without a card no more than the peak, so that `auto` offloads."""
        return self.tracker.peak if self._capacity_bytes is None else self._capacity_bytes


class ForecastHost(CountingHost):
    """Also answers for tensors without values: every number read is 1.0."""

    def number(self, value: Tensor) -> float:
        """1.0 for every tensor."""
        return 1.0

    def numbers(self, values: Tensor) -> list[float]:
        """1.0 for every entry."""
        return [1.0] * len(values)

    def has_values(self, values: Tensor) -> bool:
        """Always True, so that a history keeps the values until they are read, as it keeps real ones."""
        return True

    def with_values(self) -> AbstractContextManager[None]:
        """Tensors made inside the block are real, and are not counted."""
        return _disable_current_modes()  # type: ignore[no-any-return]

    def arena(self, *, pin: bool, settle: Callable[[], None]) -> ForecastArena:
        """An arena whose blocks hold no content."""
        return ForecastArena(self.tracker, settle=settle)


# ------------------------------------------------------------ what is not ours


@contextmanager
def tensors_without_values() -> Iterator[FakeTensorMode]:
    """Tensors made inside the block are fake; where transformers and torch would read values, they need not.

    Weights are not initialised: there are no values, and some families' initialisation (SigLIP's) reads them.
    """
    with (
        warnings.catch_warnings(),
        no_init_weights(),
        _no_mask_read(),
        _parameters_replaced(),
        FakeTensorMode() as mode,
    ):
        # every number read is 1.0, so all layers appear equally important
        warnings.filterwarnings("ignore", message="GRASS is near uniform")
        yield mode


@contextmanager
def _no_mask_read() -> Iterator[None]:
    """Make attention masks without reading the padding mask: no token is padding, but finding that out needs values.

    Uses transformers' public registry for mask functions, which is global.
    """
    usual = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    AttentionMaskInterface.register("sdpa", _without_padding(usual))
    try:
        yield
    finally:
        AttentionMaskInterface.register("sdpa", usual)


def _without_padding(make_mask: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """`make_mask` without the padding mask."""

    def make(*sizes: Any, attention_mask: Tensor | None = None, **more: Any) -> Tensor | None:
        return make_mask(*sizes, attention_mask=None, **more)

    return make


@contextmanager
def _parameters_replaced() -> Iterator[None]:
    """Make `nn.Module.to` and similar calls replace old parameters by new ones.

    torch would instead swap fake parameters with the new ones, whatever `torch.__future__` says, and fails if anything
    else refers to a parameter. It has no public option for this, so this one torch method is patched inside the block.
    """
    usual = nn.Module._apply
    nn.Module._apply = _replace_parameters  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module._apply = usual  # type: ignore[method-assign]


def _replace_parameters(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` without swapping tensors."""
    for child in module.children() if recurse else ():
        child._apply(fn)
    with torch.no_grad():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                applied = fn(parameter)
                if applied is not parameter:
                    module._parameters[name] = nn.Parameter(applied, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fn(buffer)
    return module
