"""Promises of methods and periods of sound runs that keep them: what the tests of the verdict share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from harness.training.engagement import Period
from harness.training.verdict import verdict

from baselines.method import Expectation, ModelFacts

FACTS = ModelFacts(
    architecture="Made",
    layer_parameters=(10_000,) * 4,
    embedding_parameters=5_000,
    head_parameters=3_000,
    final_norm_parameters=10,
    hidden_size=10,
    tied_embeddings=False,
)
OUTSIDE = 8_010
SAMPLED = Expectation(
    layers="sampled",
    active_layers=2,
    period_steps=3,
    embedding=True,
    head=True,
    final_norm=True,
    trainable_parameters=20_000 + OUTSIDE,
    state_bytes_per_parameter=8,
    state_of="visited",
)
FULL = Expectation(
    layers="all",
    embedding=True,
    head=True,
    final_norm=True,
    trainable_parameters=FACTS.total_parameters,
    state_bytes_per_parameter=8,
    state_of="active",
)
ADAPTERS = Expectation(
    layers="all", base_frozen=True, trainable_parameters=6_000, state_bytes_per_parameter=8, state_of="active"
)
NOTHING = Expectation(layers="none", trainable_parameters=0, state_bytes_per_parameter=0, state_of="none")
GROUPS = ["embedding", "final_norm", "head"]


def sampled_periods(*sets: list[int]) -> list[Period]:
    """Periods of a sound layer-wise method that keeps the state of sleepers."""
    periods, visited = [], set()
    for number, layers in enumerate(sets):
        visited |= set(layers)
        periods.append(
            Period(
                first_step=3 * number,
                last_step=3 * number + 2,
                moved_layers=list(layers),
                moved_base=list(layers),
                moved_groups=list(GROUPS),
                graded_layers=list(layers),
                graded_groups=list(GROUPS),
                graded_parameters=SAMPLED.trainable_parameters,
                state_bytes=8 * (OUTSIDE + 10_000 * len(visited)),
                believed_active=list(layers),
                believed_probability=[0.25] * 4,
            )
        )
    return periods


SOUND = sampled_periods([0, 1], [1, 3], [0, 2])


def full_periods() -> list[Period]:
    every = [0, 1, 2, 3]
    return [
        replace(p, moved_layers=every, moved_base=every, graded_layers=every, believed_active=None,
                graded_parameters=FULL.trainable_parameters, state_bytes=8 * FULL.trainable_parameters)
        for p in sampled_periods([0], [0])
    ]  # fmt: skip


def adapter_periods() -> list[Period]:
    return [
        replace(p, moved_base=[], moved_groups=[], graded_groups=[], graded_parameters=6_000, state_bytes=48_000)
        for p in full_periods()
    ]


def broken(promise: Expectation, periods: list[Period], **options: Any) -> list[str]:
    """Names of the checks that fail."""
    return [check.name for check in verdict(promise, FACTS, periods, **options) if not check.ok]


LAYERS, GROUPS_MOVED = "layers that moved", "groups outside the layers that moved"
GRADIENTS, TRAINABLE = "gradients exist for what moves, and for nothing else", "trainable parameters in one step"
STATE, BELIEF = "live optimizer-state bytes", "layers that moved are those the method says"
ROTATION, FROZEN = "the active set rotates", "base weights frozen"
