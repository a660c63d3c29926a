"""A model and rows small enough to train a dozen steps in a second: random Llama weights, real rows, real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from baselines import find_method
from baselines.method import Recipe
from harness.inputs.generated import training_rows
from harness.inputs.tokenizer import build_tokenizer
from harness.study.jobs import ModelJob, RowsJob, Training
from harness.study.sources import FileRows, LocalModel
from harness.training.loading import Inputs

LAYERS = 4
WIDTH = 32
RECIPE: dict[str, Any] = {
    "steps": 12,
    "batch_size": 8,
    "micro_batch_size": 8,
    "max_length": 96,
    "loss_on": "answer",
    "warmup_steps": 2,
    "max_grad_norm": 1.0,
}
LR = 3e-3


FAMILIES = ("llama", "gemma", "gpt2")
"""Llama; Gemma, whose head is tied to the embedding; GPT-2, with learned positions and `Conv1D` layers."""


def tiny_inputs(folder: Path, family: str = "llama") -> Inputs:
    """Write a random model of 4 layers with the embedded study's tokenizer, and 64 arithmetic rows, under `folder`."""
    from harness.records.atomic import write_json

    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _tiny_model(family, tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for split, count in (("train", 64), ("validation", 16)):
        rows = training_rows("arithmetic", split="train" if split == "train" else "validation", count=count, seed=1)
        write_json(folder / "rows" / f"{split}.json", rows)
    return Inputs(model=folder / "model", rows=folder / "rows")


def _tiny_model(family: str, tokenizer: Any) -> Any:
    from transformers import (
        GemmaConfig,
        GemmaForCausalLM,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
    )

    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "gpt2":
        without = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(
            GPT2Config(n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_inner=2 * WIDTH, n_positions=128, **without, **common)
        )
    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    if family == "gemma":
        return GemmaForCausalLM(GemmaConfig(head_dim=WIDTH // 4, **shape, **common))
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **shape, **common))


def tiny_training(module: str, options: dict[str, Any], **recipe: Any) -> Training:
    """A resolved spec of `baselines.<module>` on the tiny model; `recipe` overrides `RECIPE`."""
    complete = find_method(module).Config.model_validate(options).model_dump(mode="json")
    return Training(
        model=ModelJob(label="tiny", source=LocalModel(kind="local", path="tiny")),
        rows=RowsJob(label="rows", source=FileRows(kind="files", paths=("rows",), seed=0, validation_rows=16)),
        label=module,
        module=module,
        options=complete,
        recipe=Recipe.model_validate({**RECIPE, **recipe}),
        recipe_changes=(),
    )
