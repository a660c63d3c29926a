"""A host whose peak of memory never falls, for methods that follow it while meters reset the allocator's."""

from __future__ import annotations

from collections.abc import Callable

import torch

from grass.host import Host, HostAround


class PeakNeverFalls(HostAround):
    """Tells methods the highest of all peaks, though the allocator's is reset at every phase.

    Args:
        inner: asks the allocator.
        before: highest peak before the last reset.
    """

    def __init__(self, inner: Host, before: Callable[[], int]) -> None:
        super().__init__(inner)
        self._before = before

    def peak_bytes(self, device: torch.device) -> int | None:
        """Largest so far; None where nobody counts."""
        peak = super().peak_bytes(device)
        return None if peak is None else max(self._before(), peak)
