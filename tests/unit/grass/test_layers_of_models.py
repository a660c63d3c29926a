"""The decoder layers of the causal models of transformers, each built small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grass_tiny import (
    assert_every_parameter_is_in_one_place,
    batch,
    grass_of,
    same,
    train,
    weights,
)
from torch import nn

from grass import find_layers

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
