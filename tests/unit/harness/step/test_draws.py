"""Forced draws: the policy in force answers, and all else is the business of the host around which they are put."""

from __future__ import annotations

import torch
from harness.step.draws import ForcedDraws, bottom, bottom_and_top, covering, heaviest, top

from grass.host import Host, using
from grass.sampling import draw_layers


def test_policies_give_so_many_layers_and_the_covering_ones_all() -> None:
    assert (bottom_and_top(6, 3), bottom(6, 3), top(6, 3)) == ((0, 4, 5), (0, 1, 2), (3, 4, 5))
    assert [policy(5, 2) for policy in covering(5, 2)] == [(0, 1), (2, 3), (3, 4)]


def test_layers_of_unequal_size_have_draws_of_their_own_and_equal_ones_have_not() -> None:
    largest, with_bottom = heaviest((5, 9, 1, 9, 7, 2))
    assert (largest(6, 2), largest(6, 3), largest(6, 1)) == ((1, 3), (1, 3, 4), (3,))
    assert (with_bottom(6, 2), with_bottom(6, 3), with_bottom(6, 1)) == ((0, 3), (0, 1, 3), (0,))
    for count in range(1, 6):
        assert [policy(5, count) for policy in heaviest((8,) * 5)] == [top(5, count), bottom_and_top(5, count)]


def test_methods_get_what_the_policy_says_and_the_caller_is_told() -> None:
    told: list[int] = []
    draws = ForcedDraws(Host(), policy=top, on_draw=lambda: told.append(len(draws.made)))
    with using(draws):
        assert draw_layers([1.0] * 4, 2, torch.Generator()) == (2, 3)
        draws.policy = bottom
        assert draw_layers([1.0] * 4, 2, torch.Generator()) == (0, 1)
    assert draws.made == [(2, 3), (0, 1)]
    assert told == [0, 1]


def test_all_else_is_answered_by_the_host_inside() -> None:
    class Full(Host):
        def allocated_bytes(self, device: torch.device) -> int:
            return 77

    assert ForcedDraws(Full(), policy=top).allocated_bytes(torch.device("cpu")) == 77
