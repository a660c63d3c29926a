"""How many bytes may be fetched during backward without raising the peak that the step has anyway.

Memory falls as backward frees activations, but under activation checkpointing each layer's recomputation climbs again
almost to the peak. So what may be filled is the drop of the *floor*: bytes alive as backward enters a layer, compared
with the highest such floor, or with what a trained layer's own backward leaves below the peak. Off it come the
gradients that are still to be stored, since they stay; and at the end the update itself needs memory. The first step of
every period only watches.
"""

from __future__ import annotations

import torch

from grass.host import current


class BackwardHeadroom:
    """Watches the allocator at layer borders in backward; without an allocator's count there is never any."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._floor: int | None = None
        """Bytes alive as backward entered the layer it is in."""
        self._highest_floor: int | None = None
        """Highest floor of the period."""
        self._climb = 0
        """Largest rise above the floor seen at a gradient of a trained layer, the gradients themselves left out."""
        self._floor_limit: int | None = None
        """How high a floor may be, known after the period's first step."""

    def entering_layer(self) -> None:
        """Backward reached the output of a decoder layer."""
        self._floor = current().allocated_bytes(self._device)
        if self._floor is not None:
            self._highest_floor = self._floor if self._highest_floor is None else max(self._highest_floor, self._floor)

    def gradient_ready(self, *, stored: int) -> None:
        """A gradient of a trained layer was stored; `stored` bytes of gradients were since backward entered it."""
        now = current().allocated_bytes(self._device)
        if now is not None and self._floor is not None:
            self._climb = max(self._climb, now - self._floor - stored)

    def bytes(self, *, more_to_come: bool, gradients: int, update: int) -> int:
        """Headroom now; not positive where there is none.

        Args:
            more_to_come: backward will visit further layers. Without it the headroom is the distance to the peak.
            gradients: bytes of gradients that the step will end with and that were not there as backward entered the
                layer it is in.
            update: bytes that the update needs beside what is fetched now.
        """
        now, peak = current().allocated_bytes(self._device), current().peak_bytes(self._device)
        if now is None or peak is None or self._floor_limit is None or self._floor is None:
            return 0
        if not more_to_come:
            return peak - now - update
        end = self._floor + gradients
        return min(self._floor_limit - end, peak - update - end, peak - now)

    def taken(self, nbytes: int) -> None:
        """`nbytes` were fetched: the floor rises by them."""
        if self._floor is not None:
            self._floor += nbytes

    def step_done(self) -> None:
        """The update is over; after the first step of a period the limit is known."""
        peak = current().peak_bytes(self._device)
        if self._floor_limit is None and self._highest_floor is not None and peak is not None:
            self._floor_limit = min(self._highest_floor, peak - self._climb)
        self._floor = None

    def new_period(self) -> None:
        """Other layers train now: watch one step again."""
        self._floor = self._highest_floor = self._floor_limit = None
        self._climb = 0
