"""Every method keeps the contract, and GRASS and LISA are what their papers define."""

from __future__ import annotations

import pkgutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from definition import draws_ignore_probability, draws_not_uniform, grass_differs, lisa_differs
from harness.checking.contract import CHECKS, Case
from harness.training.loading import Inputs

import baselines
from baselines.method import find_method

MODULES = sorted(m.name for m in pkgutil.iter_modules(baselines.__path__) if m.name != "method")
CASES = [(module, options) for module in MODULES for options in find_method(module).EXAMPLES]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("module", "options"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_every_method_keeps_the_contract(
    module: str, options: dict[str, Any], check: Any, inputs: Inputs, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # GRASS says that a random model's layers matter alike
        assert check(Case(module, options, inputs, tmp_path)) is None


RECIPES: list[dict[str, Any]] = [
    {"weight_dtype": "bf16"},
    {"weight_dtype": "bf16", "state_dtype": "bf16"},
    {"activation_checkpointing": True},
    {"loss_on": "all", "max_grad_norm": None, "schedule": "cosine", "weight_decay": 0.1},
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: " ".join(f"{k}={v}" for k, v in recipe.items()))
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_method_keeps_its_promises_under_every_recipe(
    module: str, recipe: dict[str, Any], inputs: Inputs, tmp_path: Path
) -> None:
    record = Case(module, find_method(module).EXAMPLES[0], inputs, tmp_path).train("run", **recipe)
    assert (record.status, record.status_why) == ("ok", None)


@pytest.mark.parametrize(
    "options",
    [
        options
        for options in find_method("grass").EXAMPLES
        if options.get("sampler", "importance") in ("importance", "static") and not options.get("reprobe")
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_grass_is_the_papers_algorithm(options: dict[str, Any], inputs: Inputs, tmp_path: Path) -> None:
    assert grass_differs(Case("grass", {**options, "ema": 0.3}, inputs, tmp_path)) is None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_grass_draws_by_its_probabilities(inputs: Inputs, tmp_path: Path) -> None:
    assert draws_ignore_probability(Case("grass", find_method("grass").EXAMPLES[0], inputs, tmp_path)) is None


@pytest.mark.parametrize("options", find_method("lisa").EXAMPLES, ids=str)
def test_lisa_is_adamw_on_the_drawn_layers(options: dict[str, Any], inputs: Inputs, tmp_path: Path) -> None:
    assert lisa_differs(Case("lisa", options, inputs, tmp_path)) is None


def test_lisa_draws_uniformly(inputs: Inputs, tmp_path: Path) -> None:
    assert draws_not_uniform(Case("lisa", find_method("lisa").EXAMPLES[0], inputs, tmp_path)) is None
