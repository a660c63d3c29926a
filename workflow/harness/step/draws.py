"""Forced draws: which layers a layer-wise method trains is chosen here, so that the worst draw is met.

Memory depends on which layers are active: the lowest one decides how many layers keep activations for backward. A run
that draws by chance meets layer 0 sooner or later, so it is the worst draw that a card must hold.
"""

from __future__ import annotations

from collections.abc import Callable

from grass.host import Host, HostAround

Policy = Callable[[int, int], tuple[int, ...]]
"""(layers, active layers) -> the layers to train, ascending."""


def bottom_and_top(layers: int, count: int) -> tuple[int, ...]:
    """Layer 0 and the topmost others."""
    return (0, *range(layers - count + 1, layers))


def bottom(layers: int, count: int) -> tuple[int, ...]:
    """The lowest layers."""
    return tuple(range(count))


def top(layers: int, count: int) -> tuple[int, ...]:
    """The topmost layers."""
    return tuple(range(layers - count, layers))


CANDIDATES: tuple[Policy, ...] = (bottom_and_top, bottom, top)
"""Draws among which the worst is looked for."""


def covering(layers: int, count: int) -> list[Policy]:
    """Draws that visit every layer."""
    starts = [min(first, layers - count) for first in range(0, layers, count)]
    return [lambda _layers, _count, first=first: tuple(range(first, first + count)) for first in starts]  # type: ignore[misc]


class ForcedDraws(HostAround):
    """A host that answers every draw by the policy now in force, and all else as the one around which it is put.

    Args:
        inner: answers all else.
        policy: may be changed at any time.
        on_draw: told that a method draws.
    """

    def __init__(self, inner: Host, *, policy: Policy, on_draw: Callable[[], None] = lambda: None) -> None:
        super().__init__(inner)
        self.policy = policy
        self.taken: list[tuple[int, ...]] = []
        """The sets that methods were given."""
        self._on_draw = on_draw

    def draw(self, layers: int, count: int, by_chance: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        """The layers that train next; nothing is left to chance, and no random number is used up."""
        self._on_draw()
        self.taken.append(self.policy(layers, count))
        return self.taken[-1]
