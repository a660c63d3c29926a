"""Finding the decoder layers of models of any make, and training on what was found."""

from __future__ import annotations

import pytest
import torch
from grass_tiny import assert_every_parameter_is_in_one_place, layer_weights, llama, train
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from grass import Grass, find_layers


def test_a_path_may_begin_anywhere_if_one_list_ends_with_it() -> None:
    model = nn.Module()
    model.wrapped = nn.Module()
    model.wrapped.vision, model.wrapped.language_model = Stacks(layers=[Block()]), Stacks(layers=[Block(), Block()])
    found = find_layers(model, layers="language_model.layers")
    assert (found.name, len(found.layers)) == ("wrapped.language_model.layers", 2)
    with pytest.raises(
        ValueError, match=r"^layers='layers' leads to wrapped\.vision\.layers and to wrapped\.language_model\.layers"
    ):
        find_layers(model, layers="layers")
    with pytest.raises(
        ValueError, match=r"^layers='language\.layers' leads to no list .* wrapped\.language_model\.layers"
    ):
        find_layers(model, layers="language.layers")
    with pytest.raises(ValueError, match=r"^layers='x' leads to no list of modules in this model; .*: none$"):
        find_layers(nn.Linear(2, 2), layers="x")


def test_the_experts_of_a_layer_are_no_stack_of_their_own() -> None:
    # Mixtral's experts were such a list once, and in other libraries they still are
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(4, 3)
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Mixture() for _ in range(3))

    found = find_layers(Stack())
    assert (found.name, len(found.layers)) == ("blocks", 3)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)


class Stacks(nn.Module):
    """Lists of modules under the names given."""

    def __init__(self, **stacks: list[nn.Module]) -> None:
        super().__init__()
        for name, stack in stacks.items():
            self.add_module(name, nn.ModuleList(stack))


def test_a_small_vision_tower_makes_a_model_ambiguous_too() -> None:
    # found silently, the tower would be trained as part of the embedding
    blocks: list[nn.Module] = [Block() for _ in range(30)]
    with pytest.raises(ValueError, match=r"more than one stack .*\(tower \(1 x Block, .*, layers \(30 x Block, "):
        find_layers(Stacks(tower=[Block()], layers=blocks))


def test_lists_of_single_matrices_beside_the_stack_are_no_stacks() -> None:
    codebooks: list[nn.Module] = [nn.Embedding(100, 4) for _ in range(2)]
    heads: list[nn.Module] = [nn.Linear(4, 100) for _ in range(2)]
    model = Stacks(codebooks=codebooks, layers=[Block()], heads=heads)
    found = find_layers(model)
    assert (found.name, len(found.layers)) == ("layers", 1)
    assert_every_parameter_is_in_one_place(model, found)


def test_the_final_norm_is_found_by_its_place_where_the_parent_computes_nothing() -> None:
    model = nn.Module()
    model.body = nn.ModuleDict(
        {"words": nn.Embedding(8, 4), "norm_in": nn.LayerNorm(4), "blocks": nn.ModuleList([Block(), Block()])}
    )
    model.body["norm_out"] = nn.LayerNorm(4)
    found = find_layers(model)
    assert [id(p) for p in found.outside["final_norm"]] == [id(p) for p in model.body["norm_out"].parameters()]
    assert_every_parameter_is_in_one_place(model, found)


def test_a_norm_beside_a_module_around_the_stack_is_found() -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last_norm, self.first_norm = nn.LayerNorm(4), nn.LayerNorm(4)
            self.decoder = Stacks(layers=[Block(), Block()])

        def forward(self, x: Tensor) -> Tensor:
            x = self.decoder(self.first_norm(x))
            y: Tensor = self.last_norm(x)
            return y

    model = Around()
    # registered before the decoder and used after it; of the nested call the inner part comes first
    found = find_layers(model)
    assert [id(p) for p in found.outside["final_norm"]] == [id(p) for p in model.last_norm.parameters()]


def test_layers_that_share_a_parameter_are_refused() -> None:
    blocks: list[nn.Module] = [Block() for _ in range(3)]
    blocks[2].up.weight = blocks[0].up.weight  # type: ignore[union-attr, assignment]
    with pytest.raises(
        ValueError, match=r"^layers 0 and 2 share the parameter up\.weight, so that freezing one would "
    ):
        find_layers(Stacks(layers=blocks))
    with pytest.raises(ValueError, match=r"^layers 0 and 1 share the parameter up\.weight, .*pass layers=\[\.\.\.\]"):
        find_layers(Stacks(layers=[blocks[1]] * 2))


def test_a_layer_without_parameters_and_one_of_another_model_are_refused() -> None:
    model = Stacks(layers=[Block(), Block()])
    with pytest.raises(ValueError, match=r"^layers: number 1 \(Block\) is no submodule of the model$"):
        find_layers(model, layers=[model.layers[0], Block()])
    model.skip = nn.Identity()
    with pytest.raises(
        ValueError, match=r"^layer 1 \(Identity\) has no parameters, .*: pass layers=\[...\] without it$"
    ):
        find_layers(model, layers=[model.layers[0], model.skip])


class Plain(nn.Module):
    """No Hugging Face model: blocks under names of their own, an embedding before and a head after them."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(8, 4)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 8)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.out(self.second(torch.tanh(self.first(self.words(ids)))))
        return logits


def test_any_module_trains_with_the_layers_given_by_hand() -> None:
    torch.manual_seed(0)
    model = Plain()
    with pytest.raises(ValueError, match=r"no stack of decoder layers .* in this model: pass layers=\[...\]"):
        find_layers(model)
    with pytest.raises(ValueError, match="layers: the given list is empty"):
        find_layers(model, layers=[])
    found = find_layers(model, layers=[model.first, model.second])
    assert_every_parameter_is_in_one_place(model, found)
    opt = Grass(model, lr=0.1, active_layers=1, sample_every=2, layers=[model.first, model.second])
    ids = torch.arange(8)

    def loss(module: nn.Module, ids: Tensor) -> Tensor:
        return nn.functional.cross_entropy(module(ids), ids)

    opt.probe([ids], loss)
    start = float(loss(model, ids).detach())
    for _ in range(20):
        loss(model, ids).backward()
        opt.step()
        opt.zero_grad()
    assert float(loss(model, ids).detach()) < 0.5 * start


@settings(max_examples=20, deadline=None)
@given(active=st.integers(1, 4), period=st.integers(1, 4), seed=st.integers(0, 1000))
def test_any_valid_options_train_exactly_the_drawn_layers(active: int, period: int, seed: int) -> None:
    model = llama()
    opt = Grass(model, lr=1e-2, active_layers=active, sample_every=period, sampler="uniform", seed=seed)
    for step in range(5):
        drawn, before = opt.active, [layer_weights(opt, i) for i in range(4)]
        assert len(drawn) == active
        train(model, opt, step, step + 1)
        moved = tuple(
            i
            for i in range(4)
            if not all(torch.equal(p, b) for p, b in zip(opt.layer_parameters[i], before[i], strict=True))
        )
        assert moved == drawn
        assert (opt.active == drawn) or (step + 1) % period == 0
