"""How many bytes may be fetched during backward without raising the peak that the step has anyway.

Memory falls as backward frees activations, but under activation checkpointing each layer's recomputation climbs again
almost to the peak. So what may be filled is the drop of the *floor*: bytes alive as backward enters a layer, compared
with those as it entered the top one, less what a trained layer's own recomputation needs beyond a sleeping one's. The
first step of every period only watches.
"""

from __future__ import annotations

from grass.streams import Streams


class BackwardRoom:
    """Watches the allocator at layer borders in backward; without an allocator's count there is never room."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._floor: int | None = None
        """Bytes alive as backward entered the layer it is in."""
        self._top: int | None = None
        """Bytes alive as backward entered the top layer."""
        self._climb = 0
        """Largest rise above the floor seen at a gradient of a trained layer."""
        self._learnt: tuple[int, int] | None = None
        """(top, reserve) of the period's first step."""

    def entering_layer(self) -> None:
        """Backward reached the output of a decoder layer."""
        self._floor = self._streams.allocated()
        if self._top is None:
            self._top = self._floor

    def gradient_ready(self) -> None:
        """A gradient of a trained layer was stored."""
        now = self._streams.allocated()
        if now is not None and self._floor is not None:
            self._climb = max(self._climb, now - self._floor)

    def bytes(self, *, more_to_come: bool, gradients: int) -> int:
        """Room now; not positive where there is none.

        Args:
            more_to_come: backward will visit further layers. Without it the whole distance to the peak is room.
            gradients: bytes of the gradients stored since backward entered the layer it is in; they stay, while that
                layer's activations go before the next one's are recomputed.
        """
        now, peak = self._streams.allocated(), self._streams.peak()
        if now is None or peak is None or self._learnt is None:
            return 0
        if not more_to_come or self._floor is None:
            return peak - now
        top, reserve = self._learnt
        return top - (self._floor + gradients) - reserve

    def taken(self, nbytes: int) -> None:
        """`nbytes` were fetched: the floor rises by them."""
        if self._floor is not None:
            self._floor += nbytes

    def step_done(self) -> None:
        """The update is over; after the first step of a period the room is known."""
        peak = self._streams.peak()
        if self._learnt is None and self._top is not None and peak is not None:
            self._learnt = self._top, max(0, self._climb - (peak - self._top))
        self._floor = self._top = None

    def new_period(self) -> None:
        """Other layers train now: watch one step again."""
        self._learnt, self._climb = None, 0
