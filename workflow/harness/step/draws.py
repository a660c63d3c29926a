"""Forced draws: this module chooses the layers that a layer-wise method trains, so that the worst draw is tested.

Memory depends on which layers are active: the lowest one decides how many layers keep activations for backward. A run
with random draws draws layer 0 sooner or later, so the card must have room for the worst draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from grass.host import Host, HostAround

Policy = Callable[[int, int], tuple[int, ...]]
"""(layers, active layers) -> the layers to train, ascending."""


def bottom_and_top(layers: int, count: int) -> tuple[int, ...]:
    """Layer 0 and the `count - 1` topmost layers."""
    return (0, *range(layers - count + 1, layers))


def bottom(layers: int, count: int) -> tuple[int, ...]:
    """The `count` lowest layers."""
    return tuple(range(count))


def top(layers: int, count: int) -> tuple[int, ...]:
    """The `count` topmost layers."""
    return tuple(range(layers - count, layers))


CANDIDATES: tuple[Policy, ...] = (bottom_and_top, bottom, top)
"""Candidates for the draw with the highest peak memory."""


def heaviest(sizes: Sequence[int]) -> tuple[Policy, Policy]:
    """For layers of different sizes: the largest layers, and layer 0 with the largest others.

    Of layers of one size these are `top` and `bottom_and_top`.
    """
    by_size = sorted(range(len(sizes)), key=lambda layer: (sizes[layer], layer))

    def largest(layers: int, count: int) -> tuple[int, ...]:
        return tuple(sorted(by_size[layers - count :]))

    def bottom_and_largest(layers: int, count: int) -> tuple[int, ...]:
        others = [layer for layer in by_size if layer != 0]
        return tuple(sorted([0, *others[len(others) - count + 1 :]]))

    return largest, bottom_and_largest


def covering(layers: int, count: int) -> list[Policy]:
    """Policies whose draws together contain every layer."""
    starts = [min(first, layers - count) for first in range(0, layers, count)]
    return [lambda _layers, _count, first=first: tuple(range(first, first + count)) for first in starts]  # type: ignore[misc]


class ForcedDraws(HostAround):
    """A host that answers every draw with the current policy, and passes all other calls on to the host it wraps.

    Args:
        inner: the wrapped host.
        policy: may be changed at any time.
        on_draw: called whenever a method draws.
    """

    def __init__(self, inner: Host, *, policy: Policy, on_draw: Callable[[], None] = lambda: None) -> None:
        super().__init__(inner)
        self.policy = policy
        self.made: list[tuple[int, ...]] = []
        """Every set of layers handed out so far."""
        self._on_draw = on_draw

    def draw(self, layers: int, count: int, by_chance: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        """The layers that train next, without randomness: no random number is consumed."""
        self._on_draw()
        self.made.append(self.policy(layers, count))
        return self.made[-1]
