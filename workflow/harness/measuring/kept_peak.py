"""A host whose peak memory never falls: methods may read the peak while meters reset the allocator's."""

from __future__ import annotations

from collections.abc import Callable

import torch

from grass.host import Host, HostAround


class PeakNeverFalls(HostAround):
    """Gives methods the highest peak so far, although the allocator's peak is reset at every phase.

    Args:
        inner: the wrapped host, which reads the allocator.
        before: returns the highest peak before the last reset.
    """

    def __init__(self, inner: Host, before: Callable[[], int]) -> None:
        super().__init__(inner)
        self._before = before

    def peak_bytes(self, device: torch.device) -> int | None:
        """Highest peak so far, in bytes; None where it cannot be read."""
        peak = super().peak_bytes(device)
        return None if peak is None else max(self._before(), peak)
