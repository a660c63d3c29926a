"""A model and rows small enough to train a dozen steps in a second: random Llama weights, real rows, real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from baselines.method import Recipe, find_method
from harness.inputs.generated import training_rows
from harness.inputs.tokenizer import build_tokenizer
from harness.spec import FileRows, LocalModel, ModelJob, RowsJob, Training
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


def tiny_inputs(folder: Path, *, tied: bool = False) -> Inputs:
    """Write a random Llama of 4 layers with the embedded study's tokenizer, and 64 arithmetic rows, under `folder`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from harness.durable import write_json

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for split, count in (("train", 64), ("validation", 16)):
        rows = training_rows("arithmetic", split="train" if split == "train" else "validation", count=count, seed=1)
        write_json(folder / "rows" / f"{split}.json", rows)
    return Inputs(model=folder / "model", rows=folder / "rows")


def tiny_training(module: str, options: dict[str, Any], **recipe: Any) -> Training:
    """A resolved spec of `baselines.<module>` on the tiny model; `recipe` is laid over `RECIPE`."""
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
