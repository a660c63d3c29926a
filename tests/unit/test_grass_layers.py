"""Finding the decoder layers of any causal model, and training on what was found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grass_tiny import grass_of, layer_weights, llama, same, train, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from grass import Grass, LayerMap, find_layers
from grass.layers import OUTSIDE


def built(name: str) -> Any:
    import transformers as t

    small = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        if name == "llama":
            return llama(layers=3)
        if name == "llama-tied":
            return llama(layers=3, tied=True)
        if name == "gpt2":
            return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=3, n_head=2))
        if name == "gemma":
            config = t.GemmaConfig(**small, num_hidden_layers=3, num_key_value_heads=1, head_dim=8)
            return t.GemmaForCausalLM(config)
        if name == "gpt-neox":
            return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**small, num_hidden_layers=3, max_position_embeddings=16))
        assert name == "mixtral"
        config = t.MixtralConfig(
            **small, num_hidden_layers=3, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2
        )
        return t.MixtralForCausalLM(config)


FOUND = {
    "llama": ("model.layers", ["model.embed_tokens"], ["model.norm"], ["lm_head"]),
    "llama-tied": ("model.layers", ["model.embed_tokens"], ["model.norm"], []),
    "gpt2": ("transformer.h", ["transformer.wte", "transformer.wpe"], ["transformer.ln_f"], []),
    "gemma": ("model.layers", ["model.embed_tokens"], ["model.norm"], []),
    "gpt-neox": ("gpt_neox.layers", ["gpt_neox.embed_in"], ["gpt_neox.final_layer_norm"], ["lm_head"]),
    "mixtral": ("model.layers", ["model.embed_tokens"], ["model.norm"], ["lm_head"]),
}


def assert_every_parameter_is_in_one_place(model: nn.Module, found: LayerMap) -> None:
    placed = [id(p) for parameters in found.layer_parameters() for p in parameters]
    placed += [id(p) for key in OUTSIDE for p in found.outside[key]]
    assert len(placed) == len(set(placed))
    assert set(placed) == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("name", FOUND)
def test_the_decoder_layers_of_a_causal_model_are_found(name: str) -> None:
    model = built(name)
    found = find_layers(model)
    stack, embedding, final_norm, head = FOUND[name]
    assert (found.name, len(found.layers)) == (stack, 3)
    assert list(found.layers) == list(model.get_submodule(stack))
    for key, modules in (("embedding", embedding), ("final_norm", final_norm), ("head", head)):
        wanted = [id(p) for module in modules for p in model.get_submodule(module).parameters()]
        assert [id(p) for p in found.outside[key]] == wanted, key
    assert_every_parameter_is_in_one_place(model, found)


@pytest.mark.parametrize("name", FOUND)
def test_grass_puts_every_parameter_in_one_group_and_trains(name: str) -> None:
    model = built(name)
    opt = grass_of(model, active_layers=1)
    grouped = [id(p) for group in opt.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters()}
    before = weights(model)
    train(model, opt, 0, 1)
    assert not same(before, weights(model))


def test_an_encoder_decoder_is_ambiguous_and_both_stacks_are_named() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    with pytest.raises(ValueError) as caught:
        find_layers(model)
    said = str(caught.value)
    assert said.startswith("more than one stack could be the decoder (")
    assert "encoder.block (2 x T5Block, " in said
    assert "decoder.block (2 x T5Block, " in said
    assert said.endswith("): pass layers=list(model.<name>)")
    assert len(find_layers(model, layers=list(model.decoder.block)).layers) == 2


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
