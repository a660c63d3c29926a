"""Every method keeps the contract, and GRASS and LISA are what their papers define."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from definition import draws_ignore_probability, draws_not_uniform, grass_differs, lisa_differs
from further import further
from harness.checking.contract import (
    CHECKS,
    FAMILY_CHECKS,
    Case,
    accumulation_changes_nothing,
    loss_falls,
    observer_leaves_no_trace,
    one_seed_repeats,
    options_survive_the_config,
    promises_hold,
    resume_equals_straight,
    schedule_reaches_every_group,
    two_seeds_differ,
)
from harness.checking.tiny import FAMILIES, WIDTH, tiny_inputs
from harness.training.loading import Inputs

from baselines import find_method, method_names
from grass import quantised

MODULES = method_names()
CASES = [(module, options) for module in MODULES for options in find_method(module).EXAMPLES]


@pytest.fixture(scope="session")
def cases(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """One case for all its checks, since they share the standard run."""
    models = {"llama": inputs}
    for family in FAMILIES[1:]:
        models[family] = tiny_inputs(tmp_path_factory.mktemp(family), family)

    @cache
    def case(number: int, family: str = "llama") -> Case:
        module, options = CASES[number]
        return Case(module, options, models[family], tmp_path_factory.mktemp(module))

    return case


def names(numbers: Sequence[int]) -> list[str]:
    return [f"{CASES[number][0]}-{number}" for number in numbers]


EVERY = range(len(CASES))
FIRST = [number for number in EVERY if number == 0 or CASES[number - 1][0] != CASES[number][0]]


AT_ONCE = {options_survive_the_config, schedule_reaches_every_group}
"""Checks that train nothing."""
LONG = {loss_falls, observer_leaves_no_trace, accumulation_changes_nothing}
"""Checks that train once more, beside the run that all share."""


def with_every_change(number: int, check: Any) -> bool:
    """Most of a method's first options and of GRASS's others; that the rest train, golden losses see.

    Left out is what others imply: a run without the observer, of the same seed, has to end in the same bits too; and
    another seed means other batches, whatever the method does.
    """
    if check in (one_seed_repeats, two_seeds_differ):
        return CASES[number][0] == "grass" and number in FIRST
    return number in FIRST or check in AT_ONCE or (CASES[number][0] == "grass" and check not in LONG)


@pytest.mark.parametrize(
    ("number", "check"),
    [
        pytest.param(
            number,
            check,
            id=f"{CASES[number][0]}-{number}-{check.__name__}",
            marks=further(with_every_change(number, check)),
        )
        for number in EVERY
        for check in CHECKS
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # GRASS says that a random model's layers matter alike
def test_every_method_keeps_the_contract(number: int, check: Any, cases: Callable[..., Case]) -> None:
    assert check(cases(number)) is None


@pytest.mark.parametrize(
    "check",
    # how a run resumes does not depend on the family
    [
        pytest.param(check, id=check.__name__, marks=further(check is not resume_equals_straight))
        for check in FAMILY_CHECKS
    ],
)
@pytest.mark.parametrize("family", FAMILIES[1:])
@pytest.mark.parametrize("number", FIRST, ids=names(FIRST))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_method_keeps_it_on_a_tied_gemma_and_on_a_gpt2(
    number: int, family: str, check: Any, cases: Callable[..., Case]
) -> None:
    assert check(cases(number, family)) is None


LEAN: dict[str, Any] = {"weight_dtype": "bf16", "state_dtype": "bf16", "activation_checkpointing": True}
OTHER: dict[str, Any] = {"loss_on": "all", "max_grad_norm": None, "schedule": "cosine", "weight_decay": 0.1}
ALONE: list[dict[str, Any]] = [
    LEAN,
    OTHER,
    {"weight_dtype": "bf16"},
    {"weight_dtype": "bf16", "state_dtype": "bf16"},
    {"activation_checkpointing": True},
]


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, id=" ".join(f"{k}={v}" for k, v in recipe.items()), marks=further(recipe not in ALONE))
        for recipe in (LEAN | OTHER, *ALONE)
    ],
)
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_method_keeps_its_promises_under_every_recipe(
    module: str, recipe: dict[str, Any], inputs: Inputs, tmp_path: Path
) -> None:
    record = Case(module, find_method(module).EXAMPLES[0], inputs, tmp_path).train("run", **recipe)
    assert (record.status, record.status_why) == ("ok", None)


PRECISIONS: list[dict[str, Any]] = [
    {"state_dtype": "int8", "weight_dtype": "bf16", "stochastic_rounding": True},
    {"state_dtype": "int8"},
    {"state_dtype": "bf16", "weight_dtype": "bf16", "stochastic_rounding": True},
]
ADAMW = [
    number
    for number in EVERY
    # of the others, those that do something else with moments: all samplers treat them alike
    if find_method(CASES[number][0]).ADAMW and (number in FIRST or "state" in CASES[number][1])
]


@pytest.mark.parametrize(
    ("number", "recipe"),
    [
        pytest.param(number, recipe, marks=further(number in FIRST and recipe is PRECISIONS[0]))
        for number in ADAMW
        for recipe in (PRECISIONS if number in FIRST else PRECISIONS[1:2])
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_promises_and_resume_hold_in_8_bits_and_with_stochastic_rounding(
    number: int, recipe: dict[str, Any], inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, options = CASES[number]
    method = find_method(module)
    monkeypatch.setattr(quantised, "SMALLEST", WIDTH + 1)  # all matrices of this model are packed, its vectors are not
    monkeypatch.setattr(method, "EXAMPLE_RECIPE", {**method.EXAMPLE_RECIPE, **recipe})
    case = Case(module, options, inputs, tmp_path)
    for check in (promises_hold, resume_equals_straight, loss_falls):
        assert check(case) is None, check.__name__


@pytest.mark.parametrize("recipe", PRECISIONS[1:], ids=lambda recipe: recipe["state_dtype"])
@pytest.mark.parametrize("module", [name for name in MODULES if not find_method(name).ADAMW])
def test_a_method_with_state_of_its_own_refuses_them(
    module: str, recipe: dict[str, Any], inputs: Inputs, tmp_path: Path
) -> None:
    record = Case(module, find_method(module).EXAMPLES[0], inputs, tmp_path).train("run", **recipe)
    named = "state_dtype int8" if recipe["state_dtype"] == "int8" else "stochastic_rounding"
    assert record.status == ("skipped" if find_method(module).TRAINS else "ok")
    assert named in (record.status_why or named)


@pytest.mark.parametrize(
    "options",
    [
        options
        for options in find_method("grass").EXAMPLES
        if options.get("sampler", "importance") in ("importance", "static") and not options.get("reprobe")
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [1.0, "auto"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_grass_is_the_papers_algorithm(
    options: dict[str, Any], temperature: Any, inputs: Inputs, tmp_path: Path
) -> None:
    case = Case("grass", {**options, "ema": 0.3, "temperature": temperature}, inputs, tmp_path)
    assert grass_differs(case) is None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_grass_draws_by_its_probabilities(inputs: Inputs, tmp_path: Path) -> None:
    assert draws_ignore_probability(Case("grass", find_method("grass").EXAMPLES[0], inputs, tmp_path)) is None


@pytest.mark.parametrize("options", find_method("lisa").EXAMPLES, ids=str)
def test_lisa_is_adamw_on_the_drawn_layers(options: dict[str, Any], inputs: Inputs, tmp_path: Path) -> None:
    assert lisa_differs(Case("lisa", options, inputs, tmp_path)) is None


def test_lisa_draws_uniformly(inputs: Inputs, tmp_path: Path) -> None:
    assert draws_not_uniform(Case("lisa", find_method("lisa").EXAMPLES[0], inputs, tmp_path)) is None
