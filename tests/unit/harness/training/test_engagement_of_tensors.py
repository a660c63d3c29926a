"""The verdict on methods that choose single tensors: what they name is what moves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from engagement_periods import FACTS, GRADIENTS, STATE, TRAINABLE
from harness.training.engagement import Period
from harness.training.verdict import verdict

from baselines.method import Expectation

SIZES = {"layers.0.q": 4_000, "layers.0.k": 6_000, "layers.1.q": 4_000, "layers.1.k": 6_000, "embedding": 5_000}
CHOOSER = replace(FACTS, tensor_parameters=SIZES)
CHOSEN = Expectation(
    layers="chosen", period_steps=3, trainable_parameters=10_000, state_bytes_per_parameter=8, state_of="visited"
)
MOVED, CHOSEN_ROTATION = "tensors that moved are those the method names", "the chosen set rotates"


def chosen_periods(*sets: list[str]) -> list[Period]:
    """Periods of a sound method that chooses tensors and keeps the state of those it let go."""
    periods, visited = [], set()
    for number, names in enumerate(sets):
        visited |= set(names)
        periods.append(
            Period(
                first_step=3 * number,
                last_step=3 * number + 2,
                believed_tensors=sorted(names),
                moved_tensors=sorted(names),
                graded_tensors=sorted(names),
                graded_parameters=sum(SIZES[name] for name in names),
                state_bytes=8 * sum(SIZES[name] for name in visited),
            )
        )
    return periods


CHOICES = chosen_periods(["layers.0.q", "embedding"], ["layers.1.k"], ["layers.0.q"])


def chosen_broken(periods: list[Period], promise: Expectation = CHOSEN, **options: Any) -> list[str]:
    return [check.name for check in verdict(promise, CHOOSER, periods, **options) if not check.ok]


def test_a_method_that_chooses_tensors_is_held_to_the_tensors_it_names() -> None:
    assert chosen_broken(CHOICES) == []
    last = CHOICES[2]
    for wrong, failing in (
        ({"moved_tensors": ["layers.0.k", "layers.0.q"]}, [MOVED]),
        ({"moved_tensors": []}, [MOVED]),
        ({"graded_tensors": ["layers.0.k", "layers.0.q"]}, [GRADIENTS]),
        ({"graded_parameters": 10_001}, [TRAINABLE]),
        ({"state_bytes": 8 * 4_000}, [STATE]),
    ):
        assert chosen_broken([*CHOICES[:2], replace(last, **wrong)]) == failing, wrong
    assert chosen_broken([]) == [MOVED, TRAINABLE]


def test_a_choice_that_never_changes_must_have_been_announced() -> None:
    same = chosen_periods(["layers.0.q"], ["layers.0.q"])
    assert chosen_broken(same) == [CHOSEN_ROTATION]
    assert chosen_broken(same, replace(CHOSEN, rotates=False)) == []


def test_a_chosen_tensor_may_stand_still_in_bf16_only_if_others_move() -> None:
    still = [replace(p, moved_tensors=p.moved_tensors[:1]) for p in CHOICES]
    assert chosen_broken(still) == [MOVED]
    assert chosen_broken(still, bf16_weights=True) == []
    assert chosen_broken([replace(CHOICES[0], moved_tensors=[])], bf16_weights=True) == [MOVED]
