"""A device that is not there: the host that a forecast puts in force, and tensors without values.

`CountingHost` takes the place of all that our own code asks a device (see `grass.host`). What transformers and torch
themselves ask of values is in `tensors_without_values`. A forecast puts nothing else in the place of real code.
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
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from grass.host import PIECE_ELEMENTS, Host
from grass.offload.arena import HostArena
from grass.offload.streams import NoStreams
from harness.forecasting.tracker import Tracker


class ForecastStreams(NoStreams):
    """A device apart from its host whose allocator is the tracker; copies back are never over before they must be."""

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
        """Never seen to be over: the slowest copy holds its buffer longest."""
        return False


class ForecastArena(HostArena):
    """Host memory that holds nothing, kept apart from the device's in the count."""

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
    """Lets a CPU stand for a GPU: its memory is apart from the host's, is counted, and updates take a GPU's pieces.

    Args:
        tracker: counts.
        capacity_bytes: memory of the card, by which `offload: auto` decides; None moves.
    """

    def __init__(self, tracker: Tracker, *, capacity_bytes: int | None = None) -> None:
        self.tracker, self._capacity_bytes = tracker, capacity_bytes

    def streams(self, device: torch.device) -> ForecastStreams:
        """A GPU's, whose copies are done at once and hold their buffers as long as may be."""
        return ForecastStreams(device, self.tracker)

    def piece_elements(self, device: torch.device) -> int:
        """A GPU's."""
        return PIECE_ELEMENTS["other"]

    def allocated_bytes(self, device: torch.device) -> int:
        """Bytes alive."""
        self.tracker.was_asked = True
        return self.tracker.now

    def peak_bytes(self, device: torch.device) -> int:
        """Most bytes alive so far."""
        return self.tracker.peak

    def obtainable_bytes(self, device: torch.device) -> int:
        """The card's memory; without a card no more than the peak, so that `auto` moves."""
        return self.tracker.peak if self._capacity_bytes is None else self._capacity_bytes


class ForecastHost(CountingHost):
    """Answers for tensors without values as well: every number is 1.0."""

    def number(self, value: Tensor) -> float:
        """The same for all."""
        return 1.0

    def numbers(self, values: Tensor) -> list[float]:
        """The same for all."""
        return [1.0] * len(values)

    def has_values(self, values: Tensor) -> bool:
        """As if: a history then keeps them until they are read, as it keeps real ones."""
        return True

    def with_values(self) -> AbstractContextManager[None]:
        """Real tensors, which are not counted."""
        return _disable_current_modes()  # type: ignore[no-any-return]

    def arena(self, *, pin: bool, settle: Callable[[], None]) -> ForecastArena:
        """Blocks that hold nothing."""
        return ForecastArena(self.tracker, settle=settle)


# ------------------------------------------------------------ what is not ours


@contextmanager
def tensors_without_values() -> Iterator[None]:
    """Tensors made inside are fake, and what transformers and torch ask of values is answered for them."""
    with warnings.catch_warnings(), _no_mask_read(), _parameters_replaced(), FakeTensorMode():
        # every number read is 1.0, so all layers seem to matter alike
        warnings.filterwarnings("ignore", message="GRASS is near uniform")
        yield


@contextmanager
def _no_mask_read() -> Iterator[None]:
    """Masks of attention are made as if no token were padding, which is so, and which a mask would be read to find.

    By transformers' own door for masks of one's own; its makers of masks are a global table.
    """
    usual = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    AttentionMaskInterface.register("sdpa", _without_padding(usual))
    try:
        yield
    finally:
        AttentionMaskInterface.register("sdpa", usual)


def _without_padding(make_mask: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """`make_mask` that is not told which tokens are padding."""

    def make(*sizes: Any, attention_mask: Tensor | None = None, **more: Any) -> Tensor | None:
        return make_mask(*sizes, attention_mask=None, **more)

    return make


@contextmanager
def _parameters_replaced() -> Iterator[None]:
    """`nn.Module.to` and its like put new parameters in the place of old ones.

    torch would swap fake parameters with their successors, whatever `torch.__future__` says, and refuses to where
    anything refers to one. It offers no other way in, so this one method of torch is exchanged for the time being.
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
