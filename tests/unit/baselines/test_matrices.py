"""What methods share that choose, project or measure single tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grass_tiny import batch, llama
from hand_driven import watch_backward
from harness.step.facts import facts_of
from rival_steps import facts_of_llama, recipe_of
from torch import Tensor, nn

from baselines.matrices import (
    adam_direction,
    by_layer,
    copied_bytes,
    give_gradients,
    gradients_used_up,
    layer_tensors,
    linears_of,
    matrices_of,
    project,
    rank_too_large,
    refuse_rank,
    round_into_weights,
    train_only,
    trained_copy,
    update_before_step,
    weights_of,
)
from grass import find_layers
from grass.adamw import AdamW

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2))


def test_linears_are_those_of_the_decoder_layers_by_name_and_layer() -> None:
    model = llama()
    found = linears_of(model)
    assert [[name.split(".")[-2] for name in layer] for layer in found] == [LINEARS] * 4
    assert all(model.get_parameter(name) is m.weight for layer in found for name, m in layer.items())


def test_gpt2s_transposed_linears_are_linears() -> None:
    assert [name.split(".")[-2] for name in linears_of(gpt2())[1]] == ["c_attn", "c_proj", "c_fc", "c_proj"]


@pytest.mark.parametrize("targets", [["k_proj", "down_proj"], ["self_attn.k_proj", "mlp.down_proj"]])
def test_targets_name_the_last_parts_of_modules(targets: list[str]) -> None:
    model = llama()
    names = [name.split(".")[-2] for layer in weights_of(model, targets) for name in layer]
    assert names == ["k_proj", "down_proj"] * 4
    assert [tuple(w.shape) for w in matrices_of(model, targets)[:2]] == [(8, 16), (16, 32)]


@pytest.mark.parametrize("target", ["proj", "lm_head"])
def test_a_target_that_is_no_linear_of_the_layers_is_refused_with_those_that_are(target: str) -> None:
    with pytest.raises(ValueError, match=rf"'{target}' is no linear module .* there are: down_proj, gate_proj"):
        weights_of(llama(), [target])


@pytest.mark.parametrize("model", [llama(), llama(tied=True), gpt2()], ids=["llama", "tied", "gpt2"])
def test_tensors_of_layers_are_told_by_their_names_alone(model: Any) -> None:
    """No layer map is at hand when a method is asked whether it can run."""
    names = {id(p): name for name, p in model.named_parameters()}
    inside = {names[id(p)]: p.numel() for layer in find_layers(model).layer_parameters() for p in layer}
    assert layer_tensors(facts_of(model)) == inside


def test_values_are_grouped_by_layer_and_those_outside_are_left_out() -> None:
    assert by_layer([1.0, 2.0, 3.0, 9.0], [0, 1, 0]) == [[1.0, 3.0], [2.0]]


def test_only_what_is_active_has_gradients_and_loses_them_when_it_is_not() -> None:
    model = llama().requires_grad_(False)
    tensors = matrices_of(model)
    train_only(model, tensors, (7, 8))
    model(**batch(0)).loss.backward()
    assert [i for i, p in enumerate(tensors) if p.grad is not None] == [7, 8]
    train_only(model, tensors, (8, 27))
    assert [i for i, p in enumerate(tensors) if p.requires_grad] == [8, 27]
    assert [i for i, p in enumerate(tensors) if p.grad is not None] == [8]


def test_training_single_tensors_stops_backward_at_their_lowest_layer() -> None:
    model = llama().requires_grad_(False).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    train_only(model, matrices_of(model), (27,))
    visited = watch_backward(model)
    model(**batch(0)).loss.backward()
    assert visited == {3}


def test_ranks_are_held_against_the_smaller_side() -> None:
    model = llama()  # keys and values are 8 wide, all else at least 16
    facts = facts_of_llama(model)
    assert rank_too_large(8, facts) is None
    assert rank_too_large(9, facts) == "rank 9 is above the smaller side of model.layers.0.self_attn.k_proj.weight, 8"
    assert rank_too_large(16, facts, ["q_proj"]) is None
    refuse_rank(8, matrices_of(model))
    with pytest.raises(ValueError, match=r"rank 9 .* shape \(8, 16\): lower it"):
        refuse_rank(9, matrices_of(model))


@pytest.mark.parametrize(("shape", "low"), [((12, 5), (12, 2)), ((5, 12), (2, 12)), ((8, 8), (8, 2))], ids=str)
def test_the_smaller_side_is_projected(shape: tuple[int, int], low: tuple[int, int]) -> None:
    gradient = torch.randn(shape)
    projection = torch.randn((2, shape[1]) if shape[0] >= shape[1] else (shape[0], 2))
    projected = project(gradient, projection)
    assert projected.shape == low
    by_hand = torch.einsum("mn,rn->mr" if shape[0] >= shape[1] else "mn,mr->rn", gradient, projection)
    torch.testing.assert_close(projected, by_hand)


def test_the_direction_is_adamws_step_without_its_decay() -> None:
    weight = nn.Parameter(torch.zeros(4, 3))
    plain = AdamW([weight], lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.0)
    group = {**plain.param_groups[0], "weight_decay": 0.5}
    state: dict[str, Any] = {}
    for _ in range(3):
        before, gradient = weight.detach().clone(), torch.randn(4, 3)
        weight.grad = gradient
        plain.step()
        move = adam_direction(gradient, state, group, state_dtype=torch.float32)
        torch.testing.assert_close(move, weight.detach() - before, rtol=1e-5, atol=1e-8)
    assert state["step"] == 3


def test_an_update_comes_before_the_step_which_leaves_its_matrices_alone() -> None:
    chosen, other = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    asleep = nn.Parameter(torch.ones(2, 2))
    optimizer = AdamW([chosen, other, asleep], lr=1.0)

    def update(weight: Any, state: dict[str, Any], group: dict[str, Any]) -> None:
        state["calls"] = state.get("calls", 0) + 1
        weight.add_(weight.grad, alpha=group["lr"])

    update_before_step(optimizer, [chosen, asleep], update)
    for _ in range(2):
        chosen.grad, other.grad = torch.full((2, 2), 3.0), torch.full((2, 2), 3.0)
        optimizer.step()
    assert chosen.grad is None
    assert torch.equal(chosen, torch.full((2, 2), 7.0))
    assert torch.allclose(other, torch.full((2, 2), -1.0))
    assert dict(optimizer.state[chosen]) == {"calls": 2}
    assert not optimizer.state.get(asleep)


def test_gradients_are_used_up_one_by_one_and_everything_is_put_back() -> None:
    model, reference = llama().requires_grad_(False), llama()
    tensors = matrices_of(model)[10:13]
    reference(**batch(0)).loss.backward()
    seen: dict[int, Tensor] = {}

    def use(number: int, gradient: Tensor) -> None:
        assert all(p.grad is None for p in tensors)
        seen[number] = gradient

    with gradients_used_up(tensors, use):
        model(**batch(0)).loss.backward()
    expected = [p.grad for p in matrices_of(reference)[10:13]]
    assert sorted(seen) == [0, 1, 2]
    assert all(torch.equal(seen[i], gradient) for i, gradient in enumerate(expected) if gradient is not None)
    assert not any(p.requires_grad or p._post_accumulate_grad_hooks for p in tensors)


def test_gradients_come_in_fp32_and_an_error_leaves_nothing_behind() -> None:
    model = llama(dtype=torch.bfloat16).requires_grad_(False)
    (tensor,) = matrices_of(model)[:1]
    dtypes = []

    def fails(_: int, gradient: Tensor) -> None:
        dtypes.append(gradient.dtype)
        raise RuntimeError("stop")

    with gradients_used_up([tensor], fails), pytest.raises(RuntimeError, match="stop"):
        model(**batch(0)).loss.backward()
    assert dtypes == [torch.float32]
    assert not tensor.requires_grad
    assert not tensor._post_accumulate_grad_hooks


def test_a_bf16_weight_follows_its_fp32_copy() -> None:
    """Steps of a thousandth of a weight are lost in bf16, and add up in the copy."""
    recipe = recipe_of(weight_dtype="bf16")
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    copy = trained_copy(weight, recipe)
    assert copied_bytes(recipe) == copy.element_size() == 4
    for _ in range(8):
        weight.grad = torch.full((3,), 1e-3, dtype=torch.bfloat16)
        give_gradients([(weight, copy)])
        assert weight.grad is None
        assert copy.grad is not None
        copy -= copy.grad
        round_into_weights([(weight, copy)])
    assert torch.equal(weight.detach(), copy.to(torch.bfloat16))
    assert weight.max() < 1
    assert torch.allclose(copy, torch.full((3,), 1 - 8e-3), atol=1e-4)


def test_an_fp32_weight_is_its_own_copy() -> None:
    recipe = recipe_of(weight_dtype="fp32")
    weight = nn.Parameter(torch.ones(3))
    assert trained_copy(weight, recipe) is weight
    assert copied_bytes(recipe) == 0
    weight.grad = torch.ones(3)
    give_gradients([(weight, weight)])
    assert weight.grad is not None
    round_into_weights([(weight, weight)])
    assert torch.equal(weight.detach(), torch.ones(3))


def test_a_weight_without_a_gradient_gives_none() -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    copy = trained_copy(weight, recipe_of(weight_dtype="bf16"))
    give_gradients([(weight, copy)])
    assert copy.grad is None
