"""Finding the decoder layers of any causal model, and training on what was found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grass_tiny import batch, grass_of, layer_weights, llama, same, train, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from grass import Grass, LayerMap, find_layers
from grass.layers import OUTSIDE

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SMALL, "num_key_value_heads": 1}
"""Of the models whose attention heads share keys and values."""
GEMMA = {**GROUPED, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2}
OPT = {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16}
FUSED = {"vocab_size": 32, "hidden_size": 16, "bos_token_id": 1, "eos_token_id": 2}

# name of the model: prefix of its two classes, what its configuration is given
BUILT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", GROUPED),
    "llama-tied": ("Llama", {**GROUPED, "tie_word_embeddings": True}),
    "mistral": ("Mistral", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", GEMMA),
    "qwen3-moe": ("Qwen3Moe", {**GEMMA, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 8}),
    "mixtral": ("Mixtral", {**GROUPED, **EXPERTS, "num_local_experts": 4}),
    "gemma": ("Gemma", GEMMA),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3", GEMMA),
    "gemma3n": (
        "Gemma3n",
        {
            **GEMMA,
            "layer_types": ["full_attention"] * 3,
            "activation_sparsity_pattern": [0.0] * 3,
            "intermediate_size": [32] * 3,
            "num_kv_shared_layers": 0,
            "hidden_size_per_layer_input": 4,
            "vocab_size_per_layer_input": 32,
            "laurel_rank": 2,
        },
    ),
    "gpt2": ("GPT2", {"n_positions": 16, "n_embd": 16, "n_layer": 3, "n_head": 2, **FUSED}),
    "gpt-neox": ("GPTNeoX", SMALL),
    "phi": ("Phi", GROUPED),
    "phi3": ("Phi3", GROUPED),
    "opt": ("OPT", OPT),
    "opt-projected": ("OPT", {**OPT, "word_embed_proj_dim": 8}),
    "opt-post-norm": ("OPT", {**OPT, "word_embed_proj_dim": 8, "do_layer_norm_before": False}),
    "bloom": ("Bloom", {**FUSED, "n_layer": 3, "n_head": 2}),
    "falcon": ("Falcon", {**FUSED, "num_hidden_layers": 3, "num_attention_heads": 2}),
    "stablelm": ("StableLm", GROUPED),
    "olmo2": ("Olmo2", GROUPED),
    "lfm2": ("Lfm2", {**GROUPED, "block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention", "conv"]}),
    "bart-decoder": (
        "Bart",
        {
            **{key: SMALL[key] for key in SMALL if key.endswith(("id", "embeddings", "vocab_size"))},
            "d_model": 16,
            "decoder_layers": 3,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 32,
        },
    ),
    "jamba": (
        "Jamba",
        {
            **GROUPED,
            **EXPERTS,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
}


def built(name: str) -> Any:
    import transformers

    prefix, options = BUILT[name]
    config_class = getattr(transformers, f"{prefix}TextConfig", None) or getattr(transformers, f"{prefix}Config")
    model_class = getattr(transformers, f"{prefix}LMHeadModel", None) or getattr(transformers, f"{prefix}ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model_class(config_class(**options))


LLAMA = ("model.layers", ["model.embed_tokens"], ["model.norm"], ["lm_head"])
TIED = ("model.layers", ["model.embed_tokens"], ["model.norm"], [])
OPT_OUTSIDE = ["model.decoder.embed_tokens", "model.decoder.embed_positions"]
OPT_PROJECTED = [*OPT_OUTSIDE, "model.decoder.project_out", "model.decoder.project_in"]

# where the stack is, and the modules that are the embedding, the final norm and the head
FOUND: dict[str, tuple[str, list[str], list[str], list[str]]] = {
    "llama": LLAMA,
    "llama-tied": TIED,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "qwen3-moe": LLAMA,
    "mixtral": LLAMA,
    "gemma": TIED,
    "gemma2": TIED,
    "gemma3": TIED,
    "gemma3n": (
        "model.layers",
        [
            "model.embed_tokens",
            "model.embed_tokens_per_layer",
            "model.per_layer_model_projection",
            "model.per_layer_projection_norm",
            "model.altup_projections",
            "model.altup_unembed_projections",
        ],
        ["model.norm"],
        [],
    ),
    "gpt2": ("transformer.h", ["transformer.wte", "transformer.wpe"], ["transformer.ln_f"], []),
    "gpt-neox": ("gpt_neox.layers", ["gpt_neox.embed_in"], ["gpt_neox.final_layer_norm"], ["lm_head"]),
    "phi": ("model.layers", ["model.embed_tokens"], ["model.final_layernorm"], ["lm_head"]),
    "phi3": LLAMA,
    "opt": ("model.decoder.layers", OPT_OUTSIDE, ["model.decoder.final_layer_norm"], []),
    "opt-projected": ("model.decoder.layers", OPT_PROJECTED, ["model.decoder.final_layer_norm"], []),
    "opt-post-norm": ("model.decoder.layers", OPT_PROJECTED, [], []),
    "bloom": (
        "transformer.h",
        ["transformer.word_embeddings", "transformer.word_embeddings_layernorm"],
        ["transformer.ln_f"],
        [],
    ),
    "falcon": ("transformer.h", ["transformer.word_embeddings"], ["transformer.ln_f"], []),
    "stablelm": LLAMA,
    "olmo2": LLAMA,
    "lfm2": ("model.layers", ["model.embed_tokens"], ["model.embedding_norm"], []),
    "bart-decoder": (
        "model.decoder.layers",
        ["model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.layernorm_embedding"],
        [],
        [],
    ),
    "jamba": ("model.layers", ["model.embed_tokens"], ["model.final_layernorm"], ["lm_head"]),
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
def test_the_final_norm_is_what_normalises_after_the_last_layer_when_the_model_runs(name: str) -> None:
    model = built(name)
    found = find_layers(model)
    ran: list[nn.Module] = []

    def note(module: nn.Module, *_: Any) -> None:
        ran.append(module)

    inside = {id(module) for layer in found.layers for module in layer.modules()}
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if id(module) not in inside and own and all(p.dim() == 1 for p in own):
            module.register_forward_hook(note)
    found.layers[-1].register_forward_hook(note)
    model(**batch(0))
    after = ran[ran.index(found.layers[-1]) + 1 :]
    assert {id(p) for p in found.outside["final_norm"]} == {id(p) for norm in after for p in norm.parameters()}


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
    assert said.endswith("): pass layers='<name>'")
    by_path, by_hand = (find_layers(model, layers=given) for given in ("decoder.block", list(model.decoder.block)))
    assert (by_path.name, by_path.layers, len(by_path.layers)) == ("decoder.block", by_hand.layers, 2)
    assert by_path.outside.keys() == by_hand.outside.keys()


def test_the_layers_of_a_multimodal_model_are_those_of_its_text() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    small = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    text = {"vocab_size": 32, "num_hidden_layers": 3, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0}
    vision = {"num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text | small, vision_config=vision | small, mm_tokens_per_image=4)
    found = find_layers(Gemma3ForConditionalGeneration(config))
    assert (found.name, len(found.layers)) == ("model.language_model.layers", 3)


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
