"""Uniform draws of layers for timing: all sets are equally likely, and a few draws represent many.

A step's time depends on how far backward reaches, which depends on the lowest active layer. A handful of independent
draws would leave several per cent of noise in a throughput, so all draws of a cell are stratified: sets are numbered in
lexicographic order, which is the order of their lowest layer, and each draw is uniform in its own stratum of the
numbers. Every method on a model gets the same draws in the same order.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.step.draws import Policy


def nth_set(layers: int, count: int, number: int) -> tuple[int, ...]:
    """The set of `count` out of `layers` layers with this number in lexicographic order, counted from 0."""
    chosen: list[int] = []
    first = 0
    while len(chosen) < count:
        beginning_here = math.comb(layers - first - 1, count - len(chosen) - 1)
        if number < beginning_here:
            chosen.append(first)
        else:
            number -= beginning_here
        first += 1
    return tuple(chosen)


def stratified_sets(
    layers: int, count: int, *, draws: int, repeat: int, repeats: int, seed: int
) -> list[tuple[int, ...]]:
    """The active sets of one repeat: every `repeats`-th of `draws * repeats` strata, in random order.

    Repeats beyond `repeats` have the sets of an earlier one, in another order.
    """
    sets, stretches = math.comb(layers, count), draws * repeats
    generator = random.Random(seed)
    numbers = [int((stretch + generator.random()) / stretches * sets) for stretch in range(stretches)]
    mine = [nth_set(layers, count, min(number, sets - 1)) for number in numbers[repeat % repeats :: repeats]]
    random.Random(seed * 1_000 + repeat).shuffle(mine)
    return mine


def uniform_policy(place: int, *, draws: int, repeat: int, repeats: int, seed: int) -> Policy:
    """A policy that returns the set of period `place` of one repeat."""

    def policy(layers: int, count: int) -> tuple[int, ...]:
        return stratified_sets(layers, count, draws=draws, repeat=repeat, repeats=repeats, seed=seed)[place % draws]

    return policy


def expected_reach(layers: int, count: int) -> float:
    """Mean share of the layers that backward visits under uniform draws, if nothing below the lowest one trains."""
    return 1 - (layers - count) / (count + 1) / layers
