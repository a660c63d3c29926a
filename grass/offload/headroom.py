"""How many bytes may be fetched during backward without raising the peak that the step has anyway.

Memory falls as backward frees activations, but under activation checkpointing each layer's recomputation rises again
almost to the peak. So the headroom is the drop of the *floor*: the bytes alive as backward enters a layer, compared
with the highest floor, or with what a trained layer's own backward leaves below the peak. Gradients that are still to
be stored are subtracted, since they stay; and at the end, the update itself needs memory. The first step of every
period only measures.
"""

from __future__ import annotations

import torch

from grass.host import current


class BackwardHeadroom:
    """Reads the allocator at layer boundaries in backward; without an allocator count there is no headroom."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._floor: int | None = None
        """Bytes alive as backward entered its current layer."""
        self._highest_floor: int | None = None
        """Highest floor of the period."""
        self._climb = 0
        """Largest rise above the floor when a trained layer's gradient was stored, not counting the gradients
        themselves."""
        self._floor_limit: int | None = None
        """Highest floor allowed; known after the period's first step."""

    def entering_layer(self) -> None:
        """Backward reached the output of a decoder layer."""
        self._floor = current().allocated_bytes(self._device)
        if self._floor is not None:
            self._highest_floor = self._floor if self._highest_floor is None else max(self._highest_floor, self._floor)

    def gradient_ready(self, *, stored: int) -> None:
        """A trained layer's gradient was stored; `stored`: bytes of gradients since backward entered the layer."""
        now = current().allocated_bytes(self._device)
        if now is not None and self._floor is not None:
            self._climb = max(self._climb, now - self._floor - stored)

    def bytes(self, *, more_to_come: bool, gradients: int, update: int) -> int:
        """Headroom in bytes now; zero or negative if there is none.

        Args:
            more_to_come: backward will visit further layers. Without it the headroom is the distance to the peak.
            gradients: bytes of gradients that exist at the end of the step but did not as backward entered its current
                layer.
            update: bytes that the update needs in addition to what is fetched now.
        """
        now, peak = current().allocated_bytes(self._device), current().peak_bytes(self._device)
        if now is None or peak is None or self._floor_limit is None or self._floor is None:
            return 0
        if not more_to_come:
            return peak - now - update
        end = self._floor + gradients
        return min(self._floor_limit - end, peak - update - end, peak - now)

    def taken(self, nbytes: int) -> None:
        """`nbytes` were fetched, so the floor rises by as much."""
        if self._floor is not None:
            self._floor += nbytes

    def step_done(self) -> None:
        """The update is over; after the first step of a period the limit is known."""
        peak = current().peak_bytes(self._device)
        if self._floor_limit is None and self._highest_floor is not None and peak is not None:
            self._floor_limit = min(self._highest_floor, peak - self._climb)
        self._floor = None

    def new_period(self) -> None:
        """Other layers train now: measure one step again."""
        self._floor = self._highest_floor = self._floor_limit = None
        self._climb = 0
