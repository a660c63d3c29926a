"""Forced draws: which layers a layer-wise method trains is chosen here, so that the worst draw is met.

Memory depends on which layers are active: the lowest one decides how many layers keep activations for backward. A run
that draws by chance meets layer 0 sooner or later, so it is the worst draw that a card must hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch

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


class ForcedDraws:
    """Answers every draw by the policy now in force; `taken` lists the sets that methods were given."""

    def __init__(self, policy: Policy, on_draw: Callable[[], None] = lambda: None) -> None:
        self.policy = policy
        self.taken: list[tuple[int, ...]] = []
        self._on_draw = on_draw

    def draw(self, layers: int, count: int) -> tuple[int, ...]:
        """The layers that train next."""
        self._on_draw()
        self.taken.append(self.policy(layers, count))
        return self.taken[-1]

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Take the place of both seams by which methods draw: `grass.sampling.draw_layers` and `Grass._draw`."""

        def draw_layers(probability: Sequence[float], count: int, generator: torch.Generator) -> tuple[int, ...]:
            return self.draw(len(probability), count)

        def own_draw(grass: object) -> tuple[int, ...]:
            sampler = grass.belief.sampler  # type: ignore[attr-defined]
            return self.draw(sampler.layers, sampler.active_layers)

        with patch("grass.sampling.draw_layers", draw_layers), patch("grass.optimizer.Grass._draw", own_draw):
            yield
