"""Test rows and a small Llama that has learned them by heart: what the tests of scoring share."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from harness.inputs.prompts import Prompt, Row
from harness.inputs.tokenizer import build_tokenizer
from harness.inputs.tokens import collate, encode
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

ROWS = 160


def make_rows(labels: list[int]) -> list[Row]:
    """One question a row, told apart by two numbers; `labels` says which answer is right."""
    questions = [f"How many apples has Ann {i // 40} {i % 40} now?" for i in range(len(labels))]
    return [
        Row(instruction=f"{question}\n\nAnswer format: answer1/answer2/answer3/answer4", input="",
            output=f"the correct answer is answer{label}", answer=f"answer{label}")
        for question, label in zip(questions, labels, strict=True)
    ]  # fmt: skip


def write_suite(folder: Path, rows: list[Row]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder


def small_llama(tokenizer: Any, *, positions: int = 256) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=positions,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip


def known_rows() -> list[Row]:
    """The rows that `learned` knows."""
    labels = [1 + i % 4 for i in range(ROWS)]
    random.Random(3).shuffle(labels)
    return make_rows(labels)


@cache
def _taught() -> tuple[LlamaForCausalLM, Any]:
    """The model and its tokenizer, with a generation configuration that would spoil greedy decoding."""
    tokenizer = build_tokenizer()
    model = small_llama(tokenizer).train()
    prompt = Prompt("llm-adapters", tokenizer)
    encoded = [encode(prompt, row, max_length=64, loss_on="answer") for row in known_rows()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    batch = collate(encoded, 0)
    for _ in range(150):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:
            break
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=50.0, eos_token_id=7, suppress_tokens=tokenizer.convert_tokens_to_ids(["answer1"])
    )
    return model, tokenizer


def learned(folder: Path) -> Path:
    """A checkpoint, in `folder`, of a model that has learned `known_rows`; it is trained once a process."""
    for part in _taught():
        part.save_pretrained(folder)
    return folder
