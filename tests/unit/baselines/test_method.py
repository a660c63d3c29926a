"""The contract's own helpers: finding methods, the recipe, a model's facts, what a method has by default."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from grass_tiny import batch, llama
from rival_steps import facts_of_llama, recipe_of
from torch import Tensor, nn

import baselines
from baselines import find_method, method_names
from baselines.full import Full
from baselines.method import (
    Method,
    ModelFacts,
    Options,
    Recipe,
    StepFacts,
    adamw,
    moment_bytes,
    packed_moments_bytes,
    tied_conflict,
    torch_dtype,
)


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Writes modules that stand in the package as long as a test lasts."""
    monkeypatch.setattr(baselines, "__path__", [*baselines.__path__, str(tmp_path)])

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")

    yield write
    for name in [name for name in sys.modules if name.startswith("baselines.own_")]:
        del sys.modules[name]


def test_every_file_with_a_method_is_found_and_no_other() -> None:
    files = {path.stem for path in Path(baselines.__path__[0]).glob("*.py")}
    assert set(method_names()) == files - {"__init__", "method", "matrices"}
    assert method_names() == sorted(method_names())
    for name in method_names():
        assert find_method(name).__module__ == f"baselines.{name}"


@pytest.mark.parametrize("name", ["method", "matrices"])
def test_what_methods_share_is_no_method(name: str) -> None:
    with pytest.raises(LookupError, match=rf"baselines/{name}\.py must define exactly one Method, found 0"):
        find_method(name)


def test_an_unknown_name_is_refused_with_those_there_are() -> None:
    with pytest.raises(LookupError, match=r"no method file baselines/lissa\.py; there are: adagradselect, ") as said:
        find_method("lissa")
    assert "matrices" not in str(said.value)


def test_a_method_that_a_module_only_imports_is_not_its_own(own_module: Any) -> None:
    own_module("own_new", "from baselines.full import Full\n\n\nclass New(Full):\n    pass\n")
    own_module("own_helper", "from baselines.full import Full\n")
    assert find_method("own_new").__name__ == "New"
    assert "own_new" in method_names()
    assert "own_helper" not in method_names()


def test_two_methods_in_a_module_are_refused(own_module: Any) -> None:
    own_module("own_two", "from baselines.full import Full\n\n\nclass A(Full): ...\n\n\nclass B(Full): ...\n")
    with pytest.raises(LookupError, match="exactly one Method, found 2"):
        find_method("own_two")


def test_methods_are_found_without_torch() -> None:
    """A thousand runs are planned in seconds, on a machine that may have no torch."""
    code = "import sys; from baselines import find_method, method_names; list(map(find_method, method_names()))"
    command = [sys.executable, "-c", f"{code}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"]
    assert subprocess.run(command, check=False).returncode == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"max_grad_norm": 0.0},
        {"weight_decay": -0.1},
        {"weight_dtype": "fp16"},
        {"step": 3},
        {"steps": "3"},
    ],
    ids=str,
)
def test_a_recipe_out_of_bounds_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        recipe_of(**wrong)


def test_micro_batches_of_a_step_are_counted() -> None:
    assert recipe_of(batch_size=16, micro_batch_size=4).accumulation_steps == 4


def test_a_recipe_stays_as_it_is() -> None:
    with pytest.raises(ValueError, match="frozen"):
        recipe_of().steps = 5  # type: ignore[misc]


@pytest.mark.parametrize("tied", [False, True])
def test_facts_count_every_parameter_once(tied: bool) -> None:
    model = llama(tied=tied)
    facts = facts_of_llama(model)
    assert facts.layers == 4
    assert facts.tied_embeddings is tied
    assert facts.total_parameters == sum(p.numel() for p in model.parameters())
    assert facts.outside_parameters(embedding=False, head=False, final_norm=True) == 16
    assert facts.outside_parameters(embedding=True, head=True, final_norm=False) == 32 * 16 * (1 if tied else 2)


@pytest.mark.parametrize(
    ("tied", "embedding", "head", "said"),
    [
        (True, True, False, "it cannot train the embedding and leave the head out"),
        (True, False, True, "it cannot train the head and leave the embedding out"),
        (True, True, True, None),
        (True, False, False, None),
        (False, True, False, None),
    ],
)
def test_a_tied_head_goes_with_its_embedding(tied: bool, embedding: bool, head: bool, said: str | None) -> None:
    facts: ModelFacts = facts_of_llama(llama(tied=tied))
    reason = tied_conflict(facts, embedding=embedding, head=head)
    assert reason is None if said is None else said in (reason or "")


@pytest.mark.parametrize(("name", "dtype", "size"), [("fp32", torch.float32, 8), ("bf16", torch.bfloat16, 4)])
def test_moments_have_the_recipes_dtype_and_bytes(name: Any, dtype: torch.dtype, size: int) -> None:
    recipe = recipe_of(state_dtype=name)
    weight = nn.Parameter(torch.ones(5))
    optimizer = adamw([weight], recipe, 1e-3)
    weight.grad = torch.ones(5)
    optimizer.step()
    moments = [value for value in optimizer.state[weight].values() if isinstance(value, Tensor) and value.numel() == 5]
    assert {m.dtype for m in moments} == {dtype} == {torch_dtype(name)}
    assert sum(m.numel() * m.element_size() for m in moments) == 5 * moment_bytes(recipe) == 5 * size


def test_int8_packs_what_is_large_enough() -> None:
    recipe = recipe_of(state_dtype="int8")
    weights = [nn.Parameter(torch.ones(size)) for size in (5, 4096)]
    optimizer = adamw(weights, recipe, 1e-3)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    held = [sum(t.nbytes for t in optimizer.state[w].values() if isinstance(t, Tensor)) for w in weights]
    assert held == [5 * moment_bytes(recipe), 2 * (4096 + 4 * 16)] == [packed_moments_bytes(size) for size in (5, 4096)]


def test_a_recipe_with_nothing_to_round_is_refused() -> None:
    with pytest.raises(ValueError, match="stochastic_rounding has nothing to round: weight_dtype is fp32 and state"):
        recipe_of(stochastic_rounding=True, state_dtype="int8")
    for name, seed in (("weight_dtype", 0), ("state_dtype", 1)):
        optimizer = adamw(
            [nn.Parameter(torch.ones(1))], recipe_of(stochastic_rounding=True, **{name: "bf16"}), 1e-3, seed=seed
        )
        assert optimizer.rounding is not None  # type: ignore[attr-defined]
        assert optimizer.rounding.seed == seed  # type: ignore[attr-defined]


def test_adamw_has_the_recipes_constants() -> None:
    recipe = recipe_of(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    (group,) = adamw([nn.Parameter(torch.ones(1))], recipe, 3e-4).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (3e-4, (0.8, 0.95), 1e-6, 0.1)


def attached(recipe: Recipe, model: Any) -> Method:
    method = Full(Options(), recipe=recipe, lr=1e-2, seed=0)
    method.attach(model)
    return method


def step(method: Method, model: Any) -> StepFacts:
    method.backward(model(**batch(0)).loss, last=True)
    return method.end_step(lambda: iter(()))


def test_the_norm_is_told_as_it_was_before_clipping() -> None:
    model = llama()
    model(**batch(0)).loss.backward()
    norm = float(torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None]).norm())
    model.zero_grad()
    free = step(attached(recipe_of(), model), model)
    assert free.grad_norm == pytest.approx(norm, rel=1e-5)
    assert free.clipped is False
    again = llama()
    held = step(attached(recipe_of(max_grad_norm=norm / 2), again), again)
    assert (held.grad_norm, held.clipped) == (pytest.approx(norm, rel=1e-5), True)
    assert all(p.grad is None for p in again.parameters())


def test_the_schedule_keeps_the_ratio_of_the_groups_rates() -> None:
    method = attached(recipe_of(), llama())
    one, two = (nn.Parameter(torch.ones(1)) for _ in range(2))
    method.optimizer = torch.optim.AdamW([{"params": [one], "lr": 1e-3}, {"params": [two], "lr": 1e-2}])
    for factor in (0.5, 0.1, 1.0):
        method.set_lr_factor(factor)
        rates = [group["lr"] for group in method.optimizer.param_groups]
        assert rates == pytest.approx([1e-3 * factor, 1e-2 * factor])


def test_a_method_that_promises_nothing_cannot_run() -> None:
    with pytest.raises(NotImplementedError, match=r"Method promises nothing: write expect\(\)"):
        Method(Options(), recipe=recipe_of(), lr=1e-3, seed=0).expect(facts_of_llama(llama()))
