"""A user's `transformers.Trainer` around GRASS, quick and quiet: what the tests of `grass.hf` share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from grass_tiny import batch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from grass import Grass
from grass.hf import GrassCallback

Batch = dict[str, Tensor]
ROWS: list[dict[str, Any]] = [
    # a column that the model does not take: the Trainer's collator drops it, the probe's must as well
    {**{name: value[0] for name, value in batch(seed).items()}, "text": f"row {seed}"}
    for seed in range(14)
]

NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def collate(rows: Sequence[dict[str, Any]]) -> Batch:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def with_dropout(model: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    return model


def grass(model: nn.Module, **options: Any) -> Grass:
    return Grass(model, **{"lr": 1e-2, "active_layers": 2, "sample_every": 3, **options})


def trainer_of(
    opt: Grass,
    folder: Path,
    *,
    callbacks: Sequence[Any] = (),
    rows: Any = ROWS,
    optimizer: Any = None,
    held_out: Any = None,
    **options: Any,
) -> Trainer:
    """The three lines of a user, with arguments for a quick and quiet run; without `callbacks` the probe is short."""
    chosen: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "max_steps": 10,
        "max_grad_norm": 0.0,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    return Trainer(
        opt.model,
        TrainingArguments(output_dir=str(folder), **chosen),
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=collate,
        optimizers=(optimizer or opt, None),
        callbacks=list(callbacks) or [GrassCallback(opt, probe_batches=4)],
    )
