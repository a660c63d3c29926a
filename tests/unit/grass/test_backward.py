"""Backward visits no layer below the lowest one that trains, with gradient checkpointing too."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from grass_tiny import batch, llama, same, weights
from torch import Tensor, nn

from grass.backward import stop_at_lowest_layer

NON_REENTRANT = {"use_reentrant": False}
ACTIVE = (3, 5)


def six_layers() -> Any:
    """A Llama of which layers 3 and 5 train, and nothing outside the stack."""
    model = llama(layers=6).train()
    model.requires_grad_(False)
    for layer in ACTIVE:
        model.model.layers[layer].requires_grad_(True)
    return model


def one_pass(model: Any) -> tuple[list[int], Counter[int], dict[str, Tensor]]:
    """Layers that backward went through, forward passes of each layer, and the gradients, of one batch.

    Backward goes through a layer if a gradient with respect to its output arrives. Checkpointing runs a layer's
    forward hooks a second time, but nothing flows back into that copy of the output.
    """
    visited, forwards, handles = set(), Counter[int](), []

    def watch(index: int, layer: nn.Module) -> None:
        def count(*_: Any) -> None:
            forwards[index] += 1

        def mark(_: nn.Module, __: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda _: visited.add(index))

        handles.extend((layer.register_forward_pre_hook(count), layer.register_forward_hook(mark)))

    for index, layer in enumerate(model.model.layers):
        watch(index, layer)
    model.zero_grad()
    model(**batch(0)).loss.backward()
    for handle in handles:
        handle.remove()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return sorted(visited), forwards, grads


def visits(model: Any) -> list[int]:
    return one_pass(model)[0]


def test_backward_stops_at_the_lowest_layer_and_the_gradients_stay_the_same_to_the_last_bit() -> None:
    model = six_layers()
    visited, forwards, plain = one_pass(model)
    assert (visited, forwards.total()) == ([3, 4, 5], 6)
    assert {name.split(".")[2] for name in plain} == {"3", "5"}
    model.gradient_checkpointing_enable()
    visited, forwards, checkpointed = one_pass(model)
    assert visited == [0, 1, 2, 3, 4, 5]
    assert forwards == Counter(dict.fromkeys(range(6), 2))
    stop_at_lowest_layer(model)
    visited, forwards, stopped = one_pass(model)
    assert visited == [3, 4, 5]
    assert forwards == Counter({0: 1, 1: 1, 2: 1, 3: 2, 4: 2, 5: 2})
    assert same(plain, checkpointed)
    assert same(plain, stopped)


def test_calling_it_again_changes_nothing_and_a_new_hook_is_taken_off_too() -> None:
    model = six_layers()
    for _ in range(2):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=NON_REENTRANT)
        for _ in range(2):
            stop_at_lowest_layer(model)
            assert visits(model) == [3, 4, 5]
            assert model._require_grads_hooks == []
    assert model.is_gradient_checkpointing


def test_hooks_that_the_model_has_forgotten_are_taken_off_too() -> None:
    model = six_layers()
    model.gradient_checkpointing_enable()
    # a trainer enables it once more, and the model keeps the handle of the second hook alone
    model.gradient_checkpointing_enable()
    model.disable_input_require_grads()
    assert visits(model) == [0, 1, 2, 3, 4, 5]
    stop_at_lowest_layer(model)
    assert visits(model) == [3, 4, 5]
    model.model.gradient_checkpointing_enable()
    stop_at_lowest_layer(model)
    assert visits(model) == [3, 4, 5]


def test_a_hook_of_the_users_own_stays() -> None:
    model = six_layers()
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(1))
    model.gradient_checkpointing_enable()
    stop_at_lowest_layer(model)
    assert visits(model) == [3, 4, 5]
    assert seen == [1]


def test_reentrant_checkpointing_is_refused_before_anything_is_changed() -> None:
    model = six_layers()
    for options in ({"use_reentrant": True}, {"use_reentrant": None}, {"preserve_rng_state": True}):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        with pytest.raises(ValueError) as caught:
            stop_at_lowest_layer(model)
        assert str(caught.value) == (
            "gradient checkpointing is re-entrant, which needs a gradient at the embedding that does not train: "
            'call model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
        )
        assert len(model.get_input_embeddings()._forward_hooks) > 0
    # what the sentence advises
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    stop_at_lowest_layer(model)
    assert visits(model) == [3, 4, 5]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_without_the_hook_would_silently_lose_the_gradients_of_all_layers() -> None:
    # why it is refused, even where the hook is off already
    model = six_layers()
    model.lm_head.requires_grad_(True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.disable_input_require_grads()
    assert list(one_pass(model)[2]) == ["lm_head.weight"]
    with pytest.raises(ValueError, match="gradient checkpointing is re-entrant"):
        stop_at_lowest_layer(model)


def test_reentrant_checkpointing_that_is_switched_off_again_is_no_concern() -> None:
    model = six_layers()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.gradient_checkpointing_disable()
    stop_at_lowest_layer(model)
    assert visits(model) == [3, 4, 5]


def test_checkpointing_of_every_second_layer_is_served() -> None:
    model = six_layers()
    model.gradient_checkpointing_enable(every_n_layers=2)
    stop_at_lowest_layer(model)
    assert visits(model) == [3, 4, 5]


def test_a_model_with_checkpointing_of_its_own_keeps_the_hook() -> None:
    # code that came with a checkpoint may be re-entrant, and the hook is then needed
    model = six_layers()
    model.gradient_checkpointing_enable()
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module._gradient_checkpointing_func = lambda function, *args: function(*args)
    stop_at_lowest_layer(model)
    assert visits(model) == [0, 1, 2, 3, 4, 5]


def test_a_model_without_checkpointing_or_of_no_library_is_left_alone() -> None:
    model = six_layers()
    before = weights(model)
    stop_at_lowest_layer(model)
    assert visits(model) == [3, 4, 5]
    assert same(before, weights(model))
    stop_at_lowest_layer(nn.Linear(2, 2))


def test_it_does_not_walk_through_the_layers_and_so_is_cheap_enough_for_every_step() -> None:
    model = six_layers()
    model.gradient_checkpointing_enable()

    def walk(*_: Any, **__: Any) -> None:
        raise AssertionError("walked into the stack")

    model.model.layers.named_modules = walk
    stop_at_lowest_layer(model)
    stop_at_lowest_layer(model)
    del model.model.layers.named_modules
    assert visits(model) == [3, 4, 5]
