"""The verdict on what a method did: each promise has a check that its breach fails."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations, permutations
from typing import Any

import pytest
from engagement_periods import (
    ADAPTERS,
    BELIEF,
    FACTS,
    FROZEN,
    FULL,
    GRADIENTS,
    GROUPS,
    GROUPS_MOVED,
    LAYERS,
    NOTHING,
    OUTSIDE,
    ROTATION,
    SAMPLED,
    SOUND,
    STATE,
    TRAINABLE,
    adapter_periods,
    broken,
    full_periods,
    sampled_periods,
)
from harness.training.engagement import Period
from harness.training.verdict import CHANCE_LIMIT, chance_of_set, verdict
from hypothesis import given
from hypothesis import strategies as st


def brute_force(probability: list[float], drawn: tuple[int, ...]) -> float:
    total = 0.0
    for order in permutations(range(len(probability)), len(drawn)):
        if set(order) == set(drawn):
            chance, left = 1.0, sum(probability)
            for layer in order:
                chance, left = chance * probability[layer] / left, left - probability[layer]
            total += chance
    return total


@given(
    weights=st.lists(st.floats(0.01, 1), min_size=2, max_size=6),
    data=st.data(),
)
def test_the_chance_of_a_set_is_that_of_all_its_orders(weights: list[float], data: st.DataObject) -> None:
    p = [w / math.fsum(weights) for w in weights]
    count = data.draw(st.integers(1, len(p)))
    chances = {drawn: chance_of_set(p, drawn) for drawn in combinations(range(len(p)), count)}
    assert math.fsum(chances.values()) == pytest.approx(1)
    drawn = data.draw(st.sampled_from(sorted(chances)))
    assert chances[drawn] == pytest.approx(brute_force(p, drawn))
    assert chance_of_set(p, drawn[::-1]) == pytest.approx(chances[drawn])


def test_above_six_layers_the_chance_is_an_upper_bound() -> None:
    p = [w / 39 for w in (10, 8, 6, 5, 4, 3, 2, 1)]
    for drawn in combinations(range(8), 7):
        exact = brute_force(p, drawn)
        assert exact <= chance_of_set(p, drawn) <= 1


def test_a_set_with_a_layer_that_cannot_be_drawn_has_no_chance() -> None:
    assert chance_of_set([0.5, 0.5, 0.0], (0, 2)) == 0
    assert chance_of_set([1.0, 0.0], (0,)) == 1


def test_sound_runs_pass_every_check() -> None:
    assert broken(SAMPLED, SOUND) == []
    assert broken(FULL, full_periods()) == []
    assert broken(ADAPTERS, adapter_periods()) == []
    assert broken(NOTHING, []) == []
    names = [check.name for check in verdict(SAMPLED, FACTS, SOUND)]
    assert names == [LAYERS, GROUPS_MOVED, GRADIENTS, TRAINABLE, STATE, BELIEF, ROTATION]


@pytest.mark.parametrize(
    ("wrong", "failing"),
    [
        # a layer too many trained, honestly told
        (
            {"moved_layers": [0, 1, 2], "graded_layers": [0, 1, 2], "believed_active": [0, 1, 2],
             "graded_parameters": 30_000 + OUTSIDE},
            [LAYERS],
        ),
        # nothing trained at all, as with an optimizer built from frozen parameters
        (
            {"moved_layers": [], "graded_layers": [], "believed_active": [], "state_bytes": 8 * (OUTSIDE + 30_000),
             "graded_parameters": OUTSIDE},
            [LAYERS],
        ),
        ({"moved_groups": ["embedding", "final_norm"], "graded_groups": GROUPS}, [GROUPS_MOVED]),
        ({"moved_groups": [*GROUPS, "more"]}, [GROUPS_MOVED]),
        # a sleeping layer that still gets gradients
        ({"graded_layers": [0, 2, 3]}, [GRADIENTS]),
        ({"graded_layers": [2]}, [GRADIENTS]),
        ({"graded_groups": ["embedding"]}, [GRADIENTS]),
        ({"graded_parameters": SAMPLED.trainable_parameters + 1}, [TRAINABLE]),
        # state beyond what was visited, and state that is not there
        ({"state_bytes": 8 * (OUTSIDE + 50_000)}, [STATE]),
        ({"state_bytes": 8 * (OUTSIDE + 30_000)}, [STATE]),
        ({"state_bytes": 0}, [STATE]),
        # other layers than the method says
        ({"believed_active": [0, 3]}, [BELIEF]),
        ({"believed_active": None}, [BELIEF]),
    ],
)  # fmt: skip
def test_each_promise_of_a_layer_wise_method_is_held_by_a_check_of_its_own(
    wrong: dict[str, Any], failing: list[str]
) -> None:
    # the last of three periods is wrong: layers 0 and 2 moved, and all four have been visited
    assert broken(SAMPLED, [SOUND[0], SOUND[1], replace(SOUND[2], **wrong)]) == failing


def test_too_few_trained_parameters_are_as_wrong_as_too_many() -> None:
    fewer = [replace(p, graded_parameters=p.graded_parameters - 1) for p in SOUND]
    assert broken(SAMPLED, fewer) == [TRAINABLE]


UNEQUAL = replace(FACTS, layer_parameters=(10_000, 40_000, 20_000, 30_000))


def unequal_periods(*sets: list[int]) -> list[Period]:
    sizes = UNEQUAL.layer_parameters
    visited: set[int] = set()
    periods = []
    for period in sampled_periods(*sets):
        visited |= set(period.moved_layers)
        trained = sum(sizes[layer] for layer in period.moved_layers) + OUTSIDE
        state = 8 * (sum(sizes[layer] for layer in visited) + OUTSIDE)
        periods.append(replace(period, graded_parameters=trained, state_bytes=state))
    return periods


def test_layers_of_unequal_size_are_held_to_what_was_drawn_in_each_period() -> None:
    promise = replace(SAMPLED, trainable_parameters=70_000 + OUTSIDE)
    # the two largest layers, 1 and 3, are never drawn together
    sound = unequal_periods([0, 1], [0, 2], [2, 3])
    assert [check.name for check in verdict(promise, UNEQUAL, sound) if not check.ok] == []
    for change in (-1, 1):
        wrong = [*sound[:2], replace(sound[2], graded_parameters=sound[2].graded_parameters + change)]
        check = next(check for check in verdict(promise, UNEQUAL, wrong) if not check.ok)
        assert check.name == TRAINABLE
        assert (
            check.observed
            == f"{50_000 + OUTSIDE + change:,} where {50_000 + OUTSIDE:,} belong to what moved, at step 6"
        )
    small = replace(promise, trainable_parameters=60_000 + OUTSIDE)
    assert [check.name for check in verdict(small, UNEQUAL, sound) if not check.ok] == [TRAINABLE]


def test_drawn_adapters_are_held_to_their_own_sizes() -> None:
    promise = replace(
        SAMPLED, embedding=False, head=False, final_norm=False, layer_trained_parameters=(100, 300, 200, 100),
        trainable_parameters=500, layer_state_bytes=(800, 2400, 1600, 800),
    )  # fmt: skip
    period = replace(SOUND[0], moved_groups=[], graded_groups=[], graded_parameters=400, state_bytes=3200)
    assert broken(promise, [period]) == []
    assert broken(promise, [replace(period, graded_parameters=500)]) == [TRAINABLE]


def test_a_parameter_that_no_gradient_reaches_is_named() -> None:
    periods = [replace(p, graded_parameters=5_900, ungraded=["layers.0.unused"]) for p in adapter_periods()]
    check = next(check for check in verdict(ADAPTERS, FACTS, periods) if not check.ok)
    assert (check.name, check.observed) == (TRAINABLE, "5,900; no gradient reached layers.0.unused")


def test_only_layers_that_hold_adapters_must_move() -> None:
    some = replace(ADAPTERS, layer_trained_parameters=(0, 3_000, 0, 3_000))
    periods = [replace(p, moved_layers=[1, 3], graded_layers=[1, 3]) for p in adapter_periods()]
    assert broken(some, periods) == []
    assert broken(some, adapter_periods()) == [LAYERS]
    assert broken(ADAPTERS, periods) == [LAYERS]


def test_adapters_beside_the_embedding_may_move_and_the_embedding_may_not() -> None:
    promise = replace(ADAPTERS, embedding=True)
    periods = [replace(p, moved_groups=["embedding"], graded_groups=["embedding"]) for p in adapter_periods()]
    assert broken(promise, periods) == []
    assert broken(ADAPTERS, periods) == [GROUPS_MOVED, GRADIENTS]
    assert broken(promise, [*periods, replace(periods[0], moved_base_groups=["embedding"])]) == [FROZEN]


def test_state_of_the_active_layers_only_must_be_let_go() -> None:
    promise = replace(SAMPLED, state_of="active")
    assert broken(promise, SOUND) == [STATE]
    assert broken(promise, [replace(p, state_bytes=8 * (OUTSIDE + 20_000)) for p in SOUND]) == []


def test_a_little_more_state_than_promised_is_no_offence() -> None:
    assert broken(SAMPLED, [replace(p, state_bytes=p.state_bytes + 32 * 1024) for p in SOUND]) == []
    assert broken(SAMPLED, [replace(p, state_bytes=p.state_bytes + 60 * 1024) for p in SOUND]) == [STATE]


def test_a_set_that_never_changes_is_caught_once_chance_cannot_explain_it() -> None:
    # a pair of four repeats by chance one time in six: nine repeats are below one in a million, seven are not
    assert broken(SAMPLED, sampled_periods(*[[0, 1]] * 8)) == []
    assert broken(SAMPLED, sampled_periods(*[[0, 1]] * 10)) == [ROTATION]
    assert (1 / 6) ** 9 < CHANCE_LIMIT < (1 / 6) ** 7
    # one change is enough to have drawn
    assert broken(SAMPLED, sampled_periods(*[[0, 1]] * 9, [1, 2])) == []


def test_a_set_that_the_method_makes_certain_may_stay() -> None:
    certain = [replace(p, believed_probability=[0.5, 0.499, 0.0005, 0.0005]) for p in sampled_periods(*[[0, 1]] * 10)]
    assert broken(SAMPLED, certain) == []


def test_all_layers_active_need_not_rotate() -> None:
    promise = replace(SAMPLED, active_layers=4, trainable_parameters=FACTS.total_parameters)
    periods = [replace(p, believed_active=[0, 1, 2, 3]) for p in full_periods() * 10]
    assert broken(promise, periods) == []


def test_base_weights_that_moved_under_adapters_are_caught() -> None:
    periods = adapter_periods()
    periods[1] = replace(periods[1], moved_base=[2])
    assert broken(ADAPTERS, periods) == [FROZEN]
    named = next(check for check in verdict(ADAPTERS, FACTS, periods) if check.name == FROZEN)
    assert named.observed == "moved: 2"


def test_adapters_that_train_a_group_they_did_not_promise_are_caught() -> None:
    periods = [replace(p, moved_groups=["head"], graded_groups=["head"]) for p in adapter_periods()]
    assert broken(ADAPTERS, periods) == [GROUPS_MOVED, GRADIENTS]


def test_full_fine_tuning_that_leaves_a_layer_out_is_caught() -> None:
    periods = full_periods()
    periods[0] = replace(periods[0], moved_layers=[0, 1, 2], graded_layers=[0, 1, 2])
    assert broken(FULL, periods) == [LAYERS]


def test_a_run_without_a_finished_period_proves_nothing() -> None:
    for promise in (SAMPLED, FULL, ADAPTERS):
        assert LAYERS in broken(promise, [])


def test_a_method_that_promised_to_do_nothing_must_do_nothing() -> None:
    idle = replace(SOUND[0], moved_layers=[], moved_groups=[], state_bytes=0)
    assert broken(NOTHING, [idle]) == []
    assert broken(NOTHING, [replace(idle, moved_layers=[1])]) == [LAYERS]
    assert broken(NOTHING, [replace(idle, moved_groups=["head"])]) == [GROUPS_MOVED]
    assert broken(NOTHING, [replace(idle, state_bytes=100_000)]) == [STATE]


def test_a_final_norm_may_stand_still_in_bf16_only() -> None:
    still = [replace(p, moved_groups=["embedding", "head"]) for p in SOUND]
    assert broken(SAMPLED, still) == [GROUPS_MOVED]
    assert broken(SAMPLED, still, bf16_weights=True) == []
    others = [replace(p, moved_groups=["final_norm", "head"]) for p in SOUND]
    assert broken(SAMPLED, others, bf16_weights=True) == [GROUPS_MOVED]


def test_a_tied_head_is_promised_and_expected_nowhere() -> None:
    tied = replace(FACTS, head_parameters=0, tied_embeddings=True)
    periods = [
        replace(p, moved_groups=GROUPS[:2], graded_groups=GROUPS[:2], graded_parameters=25_010,
                state_bytes=p.state_bytes - 8 * 3_000)
        for p in SOUND
    ]  # fmt: skip
    checks = verdict(replace(SAMPLED, trainable_parameters=25_010), tied, periods)
    assert [check.name for check in checks if not check.ok] == []


def test_fused_backward_must_leave_no_gradient_and_its_state_is_a_constant() -> None:
    fused = replace(FULL, gradients="consumed", state_of="constant", state_bytes=100_000)
    freed = [replace(p, graded_layers=[], graded_groups=[], graded_parameters=0, state_bytes=100_000)
             for p in full_periods()]  # fmt: skip
    assert broken(fused, freed) == []
    assert broken(fused, [replace(freed[0], graded_parameters=10)]) == ["gradients are used up in backward"]
    assert broken(fused, [replace(freed[0], state_bytes=200_000)]) == [STATE]


def test_state_of_adapters_in_sampled_layers_follows_the_bytes_promised_for_each() -> None:
    promise = replace(SAMPLED, layer_state_bytes=(400_000, 200_000, 200_000, 200_000))
    first = replace(SOUND[0], state_bytes=8 * OUTSIDE + 600_000)
    assert broken(promise, [first]) == []
    assert broken(promise, [replace(first, state_bytes=8 * OUTSIDE + 400_000)]) == [STATE]
