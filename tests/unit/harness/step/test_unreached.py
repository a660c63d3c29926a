"""What no gradient of text reaches: constants kept as frozen parameters, and the towers of multimodal models.

No method trains them, and checkpoints keep them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from further import a_few
from harness.checking.contract import Case, promises_hold
from harness.checking.tiny import tiny_inputs
from harness.inputs.models import load_model
from harness.step.facts import facts_of
from harness.training.loading import Inputs

from baselines import find_method, method_names

LAYERWISE = [
    name
    for name in method_names()
    if name in ("full", "lisa", "grass", "badam", "hift", "misa", "blockllm", "ows", "adagradselect", "ist", "bread")
]
BIAS = "model.layers.1.mlp.gate.moe_statics.e_score_correction_bias"


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A tiny Ernie 4.5 mixture of experts; its correction biases, which no gradient reaches, are frozen parameters."""
    from transformers import AutoTokenizer, Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

    inputs = tiny_inputs(tmp_path_factory.mktemp("experts"))
    tokenizer: Any = AutoTokenizer.from_pretrained(inputs.model)
    config = Ernie4_5_MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, moe_intermediate_size=16, moe_num_experts=2, moe_k=2, moe_num_shared_experts=1,
        moe_layer_start_index=0, max_position_embeddings=128, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Ernie4_5_MoeForCausalLM(config)
    assert not model.get_parameter(BIAS).requires_grad
    with torch.no_grad():
        model.get_parameter(BIAS).fill_(0.25)
    model.save_pretrained(inputs.model)
    return inputs


def test_they_are_buffers_under_the_same_key(experts: Inputs, tmp_path: Path) -> None:
    model: Any = load_model(experts.model, weight_dtype="fp32")
    assert all(p.requires_grad for p in model.parameters())
    assert BIAS not in dict(model.named_parameters())
    assert torch.equal(model.get_buffer(BIAS), torch.full_like(model.get_buffer(BIAS), 0.25))
    facts = facts_of(model)
    assert facts.total_parameters == sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path / "again")
    again: Any = load_model(tmp_path / "again", weight_dtype="fp32")
    assert model.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("module", a_few(LAYERWISE, one_in=4))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_every_layerwise_method_keeps_its_promises(module: str, experts: Inputs, tmp_path: Path) -> None:
    case = Case(module, find_method(module).EXAMPLES[0], experts, tmp_path)
    assert promises_hold(case) is None
    checkpoint = case.standard().checkpoint
    assert checkpoint is not None
    trained: Any = load_model(Path(checkpoint), weight_dtype="fp32")
    assert torch.equal(trained.get_buffer(BIAS), torch.full_like(trained.get_buffer(BIAS), 0.25))


def test_sinusoids_stay_as_they_are_and_a_quantised_weight_is_no_constant() -> None:
    from harness.step.facts import unreached_as_buffers
    from transformers import RoFormerConfig, RoFormerForCausalLM

    config = RoFormerConfig(
        vocab_size=32, embedding_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, is_decoder=True,
    )  # fmt: skip
    model: Any = RoFormerForCausalLM(config).eval()
    ids = torch.arange(8)[None]
    before = model(ids).logits
    table = model.roformer.encoder.embed_positions.weight
    packed = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    model.register_parameter("packed", packed)
    unreached_as_buffers(model, as_built=model)
    assert isinstance(model.packed, torch.nn.Parameter)
    model.requires_grad_(False)
    assert torch.equal(model.roformer.encoder.embed_positions.weight, table)
    assert "roformer.encoder.embed_positions.weight" in dict(model.named_buffers())
    assert torch.equal(model(ids).logits, before)


# ------------------------------------------------------------ towers


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """A vision-language model, as `AutoModelForCausalLM` makes of Gemma 3."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config

    inputs = tiny_inputs(tmp_path_factory.mktemp("towers"))
    tokenizer: Any = AutoTokenizer.from_pretrained(inputs.model)
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    text = {"vocab_size": len(tokenizer) + 3, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, **shared}
    vision = {"num_hidden_layers": 2, "image_size": 28, "patch_size": 14, **shared}
    first = len(tokenizer)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        Gemma3Config(
            text_config=text, vision_config=vision, image_token_index=first, boi_token_index=first + 1,
            eoi_token_index=first + 2, mm_tokens_per_image=4, pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(inputs.model)  # fmt: skip
    return inputs


def beside(model: Any) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.state_dict().items() if "vision_tower" in key or "projector" in key}


def test_the_towers_are_buffers_and_the_text_has_the_layers(towers: Inputs) -> None:
    model: Any = load_model(towers.model, weight_dtype="fp32")
    assert len(beside(model)) > 30
    assert not beside(model).keys() & dict(model.named_parameters()).keys()
    facts = facts_of(model)
    assert facts.layers == 4
    assert facts.total_parameters == sum(p.numel() for p in model.model.language_model.parameters())
    assert facts.hidden_size == 32


# of each kind one: all parameters, layers drawn, blocks, matrices, adapters, adapters in layers that are drawn
@pytest.mark.parametrize("module", a_few(["grass", "lora", "full", "badam", "galore", "ist"], one_in=4))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_methods_train_the_text_of_a_multimodal_model(module: str, towers: Inputs, tmp_path: Path) -> None:
    case = Case(module, find_method(module).EXAMPLES[0], towers, tmp_path)
    assert promises_hold(case) is None
    checkpoint = case.standard().checkpoint
    assert checkpoint is not None
    before, after = (beside(load_model(Path(folder), weight_dtype="fp32")) for folder in (towers.model, checkpoint))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
