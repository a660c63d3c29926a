"""Pretraining of the embedded study's small Llama on generated text; about a minute on one core."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.errors import UserError
from harness.inputs.generated import pieces
from harness.inputs.make_models import describe_model
from harness.inputs.prompts import training_prompt
from harness.inputs.tokenizer import build_tokenizer
from harness.progress import Progress, say
from harness.records.atomic import whole_folder
from harness.records.claim import claim, with_code
from harness.records.code import PRETRAINED_MODEL
from harness.records.inputs import ModelRecord
from harness.records.provenance import provenance
from harness.step import resume
from harness.step.model_classes import LlamaConfig, LlamaForCausalLM
from harness.study.jobs import ModelJob
from harness.study.sources import Corpus, PretrainedHere

_POSITIONS = 512
"""Longest text the model takes; rotary positions cost nothing."""
_IN_TEMPLATE = 0.5
"""Share of questions shown inside the prompt template, so that its tokens have trained embeddings."""
_WARMUP_STEPS = 20
_MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Pretrained:
    """What pretraining produces besides the model folder."""

    parameters: int
    losses: list[tuple[int, float]]
    """(step, mean loss in nats per token since the entry before), about ten entries."""


def make_pretrained(job: ModelJob, folder: Path, *, state_folder: Path | None = None) -> ModelRecord:
    """Pretrain a study's own model into `folder`/model and write manifest.json beside it, last.

    Args:
        job: the resolved spec.
        folder: of the model job.
        state_folder: where resume state lies, from which a killed pretraining goes on; None: it begins anew.

    Raises:
        UserError: the model is one that is found or fetched.
    """
    started = time.perf_counter()
    if not isinstance(job.source, PretrainedHere):
        raise UserError(f"{job.name}: this model is not pretrained here; use `prefetch model`")
    origin = provenance(roots=PRETRAINED_MODEL, inputs={})
    weights = folder / "model"
    if state_folder is not None:
        claim(state_folder, with_code({"spec": job.name}, PRETRAINED_MODEL))
    losses = pretrain(job.source, weights, state_folder=state_folder).losses
    return describe_model(
        job.name,
        weights,
        where=os.path.relpath(weights),
        came_from="pretraining",
        into=folder,
        started=started,
        provenance=origin,
        losses=losses,
    )


def pretrain(source: PretrainedHere, folder: Path, *, state_folder: Path | None = None) -> Pretrained:
    """Pretrain and save model (safetensors) and tokenizer into `folder`, which appears whole or not at all.

    AdamW with betas (0.9, 0.95), gradients clipped at norm 1, linear decay to 0 after a warm-up of 20 steps. Weights
    and text depend on `source.seed` alone; the caller's random state is left as it was. Uses torch's own thread count.
    """
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source.seed)
        model = _small_llama(source, tokenizer)
        losses = _train(model, source, tokenizer, state_folder)
    with whole_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    return Pretrained(parameters=sum(p.numel() for p in model.parameters()), losses=losses)


def batches(corpus: Corpus, tokenizer: Any, *, rows: int, length: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of token ids, int64 of shape (rows, length).

    Every row starts with a new piece of text (as rows do in fine-tuning) and is filled with further pieces, each with
    its start and end token; the last piece is cut at the row's end, so there is no padding.
    """
    rng = np.random.default_rng(seed)
    texts = (_text(piece, rng) for piece in pieces(rng, **corpus.model_dump()))
    tokens = _tokens(texts, tokenizer)
    while True:
        yield torch.tensor([_filled(tokens, length) for _ in range(rows)])


def _text(piece: Any, rng: np.random.Generator) -> str:
    if isinstance(piece, str):
        return piece
    opening = training_prompt(piece["instruction"]) if rng.random() < _IN_TEMPLATE else piece["instruction"] + " "
    return opening + str(piece["output"])


def _tokens(texts: Iterator[str], tokenizer: Any) -> Iterator[list[int]]:
    while True:  # in blocks, since tokenising each text by itself takes ten times as long
        for ids in tokenizer(list(islice(texts, 1000)))["input_ids"]:
            yield [*ids, tokenizer.eos_token_id]


def _filled(tokens: Iterator[list[int]], length: int) -> list[int]:
    row: list[int] = []
    while len(row) < length:
        row += next(tokens)
    return row[:length]


def _small_llama(source: PretrainedHere, tokenizer: Any) -> Any:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=source.width,
        intermediate_size=source.feed_forward,
        num_hidden_layers=source.layers,
        num_attention_heads=source.heads,
        num_key_value_heads=source.heads,
        max_position_embeddings=_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def _train(model: Any, source: PretrainedHere, tokenizer: Any, state_folder: Path | None) -> list[tuple[int, float]]:
    """Train in place; return the loss curve. The state is saved with each of its entries, but the last."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=source.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, source.steps))
    text = batches(source.corpus, tokenizer, rows=source.rows, length=source.length, seed=source.seed)
    losses: list[tuple[int, float]] = []
    since: list[float] = []
    found = None if state_folder is None else resume.load(state_folder, model)
    done, rest, torn = found or (0, {}, [])
    for line in torn:
        say(f"pretraining: warning: {line}")
    if rest:
        optimizer.load_state_dict(rest["optimizer"])
        schedule.load_state_dict(rest["schedule"])
        losses = [(step, loss) for step, loss in rest["losses"]]
        next(islice(text, done - 1, None))  # what was read
    with Progress(source.steps, "pretraining", done=done) as progress:
        for step in range(done + 1, source.steps + 1):
            ids = next(text)
            logits = model(input_ids=ids, use_cache=False).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            since.append(loss.item())
            progress.advance(f"loss {since[-1]:.3f}")
            if step % max(1, source.steps // 10) == 0 or step == source.steps:
                losses.append((step, sum(since) / len(since)))
                since.clear()
                if state_folder is not None and step < source.steps:
                    kept = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "losses": losses}
                    resume.save(state_folder, step=step, module=model, frozen=(), rest=kept)
    return losses


def _lr_factor(step: int, steps: int) -> float:
    return min((step + 1) / _WARMUP_STEPS, (steps - step) / max(1, steps - _WARMUP_STEPS), 1.0)
