"""The simulation behind the claims' statistics: its truth is right, and equal methods stay equal."""

from __future__ import annotations

import numpy as np
import pytest

from tests.simulated_truth import World, counted, table


def test_the_truth_of_a_world_is_what_many_items_and_seeds_show() -> None:
    world = World(seeds=200, items=4000, rivals=1, seed_spread=0.2, idiosyncrasy=1.0, effect=0.5)
    rng = np.random.default_rng(0)
    assert World(seeds=3, items=9, rivals=1, seed_spread=0.2, idiosyncrasy=1.0).truth() == 0
    logits = -0.5 + np.sqrt(1.5**2 + 0.2**2 + 1.0) * rng.standard_normal(2_000_000)
    seen = float((1 / (1 + np.exp(-logits - 0.5)) - 1 / (1 + np.exp(-logits))).mean())
    assert world.truth() == pytest.approx(seen, abs=0.002)


def test_equal_methods_are_seldom_called_different() -> None:
    world = World(seeds=3, items=60, rivals=3, seed_spread=0.1, idiosyncrasy=1.0)
    found = counted(world, 15, 0)
    assert found.any_claim <= 1 / 15
    assert found.hull >= max(found.bootstrap, found.seed_t) >= 0.8
    assert f"| {100 * found.hull:.1f} % |" in table([(world, found)], 15)
