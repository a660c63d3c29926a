"""Where the real code asks a device something that fake tensors cannot answer, and what it is told instead.

Everything that a forecast puts in the place of real code is in this file.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from grass.adamw import PIECE_ELEMENTS
from grass.offload.blocks import HostArena
from grass.offload.streams import NoStreams
from grass.sampling import LayerSampler
from harness.forecasting.tracker import Tracker


class ForecastStreams(NoStreams):
    """A device apart from its host whose allocator is the tracker; copies back are never over before they must be."""

    def __init__(self, device: torch.device, tracker: Tracker, capacity_bytes: int | None) -> None:
        super().__init__(device)
        self.apart = True
        self._tracker, self._capacity = tracker, capacity_bytes

    def allocate(self, elements: int, dtype: torch.dtype) -> Tensor:
        """A buffer for moments."""
        buffer = super().allocate(elements, dtype)
        self._tracker.mark("optimizer states", [buffer])
        return buffer

    def done(self, event: None) -> bool:
        """Never seen to be over: the slowest copy holds its buffer longest."""
        return False

    def allocated(self) -> int:
        """Bytes alive."""
        self._tracker.was_asked = True
        return self._tracker.now

    def peak(self) -> int:
        """Most bytes alive so far."""
        return self._tracker.peak

    def free_at_peak(self) -> int:
        """What the card has beyond the peak; without a card nothing, so that `auto` moves."""
        return 0 if self._capacity is None else self._capacity - self._tracker.peak


@contextmanager
def device_seams(tracker: Tracker, *, capacity_bytes: int | None = None) -> Iterator[None]:
    """Let a CPU stand for a GPU: its memory is apart from the host's, is counted, and updates take a GPU's pieces.

    Args:
        tracker: counts.
        capacity_bytes: memory of the card, by which `offload: auto` decides; None moves.
    """

    def streams_for(device: torch.device) -> ForecastStreams:
        return ForecastStreams(device, tracker, capacity_bytes)

    with ExitStack() as stack:
        stack.enter_context(patch("grass.offload.offload.streams_for", streams_for))
        stack.enter_context(patch.dict(PIECE_ELEMENTS, cpu=PIECE_ELEMENTS["other"]))
        yield


@contextmanager
def fake_seams(tracker: Tracker) -> Iterator[None]:
    """Answers for what tensors without values cannot tell: host blocks, numbers read, masks, modules converted."""

    class ForecastArena(HostArena):
        """Host memory that holds nothing, kept apart from the device's in the count."""

        def take(self, elements: int, dtype: torch.dtype) -> Tensor:
            self.nbytes += 2 * elements * dtype.itemsize
            with tracker.on_host():
                return torch.zeros(2, elements, dtype=dtype)

        def give_back(self, block: Tensor) -> None:
            self.nbytes -= block.nbytes

    def read(grass: object, values: Tensor) -> list[float]:
        return [1.0] * len(values)

    def follow(sampler: LayerSampler, importance: Sequence[float], **options: Any) -> None:
        # arithmetic of the host, on numbers that are known: it needs tensors with values
        with _disable_current_modes():
            really_follow(sampler, importance, **options)

    really_follow = LayerSampler.follow
    with ExitStack() as stack:
        for name, instead in (
            ("grass.offload.offload.HostArena", ForecastArena),
            ("grass.optimizer.Grass._read", read),
            ("grass.sampling.LayerSampler.follow", follow),
            ("baselines.method.read_number", lambda value: 1.0),
            # a history lets go of tensors without values, and keeps real ones until they are read
            ("grass.trace.FakeTensor", ()),
            ("transformers.masking_utils._ignore_causal_mask_sdpa", _without_padding()),
            ("torch.nn.Module._apply", _replace_parameters),
        ):
            stack.enter_context(patch(name, instead))
        # every number read is 1.0, so all layers seem to matter alike
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="GRASS is near uniform")
        yield


def _without_padding() -> Callable[..., bool]:
    """Whether attention is plainly causal, asked of a mask that cannot be read and is known to hide nothing."""
    from transformers import masking_utils

    really_ignore = masking_utils._ignore_causal_mask_sdpa

    def ignore(padding_mask: Tensor | None, *sizes: Any, **more: Any) -> bool:
        return bool(really_ignore(None, *sizes, **more))

    return ignore


def _replace_parameters(module: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` without swapping tensors, which torch refuses for fake parameters that anything refers to."""
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
