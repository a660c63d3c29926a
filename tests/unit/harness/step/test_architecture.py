"""How attention is computed and how many positions there are: found from the model, held to what its forward does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from harness.forecasting.forecast import forecast
from harness.step.architecture import asked_attention, attention_of, check_length, positions_of
from harness.step.cell import CellRun, build_model
from harness.step.outcomes import CannotRunError
from harness.step.spec import Cell, Numerics, Settings, Shape
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CTRLConfig,
    Gemma2Config,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    MptConfig,
    OPTConfig,
    RobertaConfig,
)

POSITIONS = 24
VOCABULARY = 105
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}


def gemma2(**changes: Any) -> Gemma2Config:
    return Gemma2Config(**COMMON, head_dim=8, num_key_value_heads=2, intermediate_size=64, **changes)


def gpt2() -> GPT2Config:
    return GPT2Config(**SMALL, n_embd=32, n_positions=POSITIONS)


def llama() -> LlamaConfig:
    return LlamaConfig(**COMMON, intermediate_size=64, max_position_embeddings=POSITIONS)


def bloom() -> BloomConfig:
    return BloomConfig(**SMALL, hidden_size=32)


def model_of(config: Any) -> Any:
    return AutoModelForCausalLM.from_config(config, attn_implementation=asked_attention(config)).eval()


@pytest.mark.parametrize(
    ("config", "kind", "why"),
    [
        (llama(), "sdpa", None),
        (bloom(), "eager", "BloomForCausalLM has no SDPA"),
        (gemma2(), "eager", "SDPA drops attn_logit_softcapping, 50 here"),
        (gemma2(attn_logit_softcapping=None), "sdpa", None),
    ],
)
def test_attention_is_sdpa_where_that_is_the_same_model(config: Any, kind: str, why: str | None) -> None:
    found = attention_of(model_of(config))
    assert (found.kind, found.why) == (kind, why)


def test_sdpa_does_drop_the_cap_and_what_is_asked_for_does_not() -> None:
    """Else eager would be asked for in vain. The cap is made so low that it binds."""
    changes = {"attn_logit_softcapping": 1e-3, "initializer_range": 1.0}
    ids = torch.arange(20).reshape(1, 20) + 3
    ours = model_of(gemma2(**changes))
    other = AutoModelForCausalLM.from_config(gemma2(**changes), attn_implementation="sdpa").eval()
    other.load_state_dict(ours.state_dict())
    assert not torch.allclose(ours(ids).logits, other(ids).logits, atol=1e-2)
    other.set_attn_implementation("eager")
    assert torch.equal(ours(ids).logits, other(ids).logits)


@pytest.mark.parametrize(
    "config",
    [
        gpt2(),
        OPTConfig(**COMMON, ffn_dim=64, word_embed_proj_dim=32, max_position_embeddings=POSITIONS),
        GPTJConfig(**SMALL, n_embd=32, n_positions=POSITIONS, rotary_dim=4),
        CTRLConfig(**SMALL, n_embd=32, dff=64, n_positions=POSITIONS),
        MptConfig(
            **{k: v for k, v in SMALL.items() if "n_" not in k},
            d_model=32,
            n_layers=2,
            n_heads=4,
            max_seq_len=POSITIONS,
        ),
        # one row is kept for padding, see below
        RobertaConfig(**COMMON, intermediate_size=64, max_position_embeddings=POSITIONS + 1, is_decoder=True),
    ],
    ids=lambda config: config.model_type,
)
def test_positions_are_as_many_as_forward_takes(config: Any) -> None:
    model = model_of(config)
    assert positions_of(model) == POSITIONS
    model(torch.full((1, POSITIONS), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, POSITIONS + 1), 5))
    check_length(model, POSITIONS, what="recipe.max_length")
    with pytest.raises(CannotRunError, match=rf"^recipe.max_length is 25, and {type(model).__name__} has 24 positions"):
        check_length(model, POSITIONS + 1, what="recipe.max_length")


@pytest.mark.parametrize("config", [llama(), bloom()], ids=lambda config: config.model_type)
def test_where_positions_are_computed_there_is_no_end(config: Any) -> None:
    model = model_of(config)
    assert positions_of(model) is None
    model(torch.full((1, 3 * POSITIONS), 5))


def cell(folder: Path, config: Any, *, length: int = 16) -> Cell:
    config.save_pretrained(folder)
    return Cell(
        model=folder, module="full", options={}, settings=Settings(activation_checkpointing=False, chunked_loss=False),
        shape=Shape(batch=2, length=length),
        numerics=Numerics(weight_dtype="fp32", state_dtype="fp32", max_grad_norm=1.0),
    )  # fmt: skip


@pytest.mark.parametrize("config", [bloom(), gemma2()], ids=lambda config: config.model_type)
def test_steps_of_a_model_without_sdpa_are_forecast_and_run(tmp_path: Path, config: Any) -> None:
    run = cell(tmp_path, config)
    assert attention_of(build_model(run.model, weight_dtype="fp32", device="meta")).kind == "eager"
    foretold, counted = (forecast(run, tensors=tensors).peak_bytes for tensors in ("fake", "real"))
    assert foretold == pytest.approx(counted, rel=0.01)


def test_a_cell_longer_than_the_positions_is_refused_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(CannotRunError, match="length of a row is 25, and GPT2LMHeadModel has 24 positions"):
        CellRun(cell(tmp_path, gpt2(), length=25), steps=1, device="cpu", enter=lambda _: None)
