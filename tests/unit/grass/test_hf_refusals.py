"""What the Trainer may not be told to do with GRASS is refused before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from grass_tiny import llama
from trainer_runs import grass, trainer_of
from transformers import TrainingArguments

from grass.hf import GrassCallback


@pytest.fixture(autouse=True)
def _accelerate_starts_afresh() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"max_grad_norm": 1.0},
        {"max_grad_norm": 0.5},
        "gradients would be clipped twice, by TrainingArguments(max_grad_norm=1.0) and by Grass(max_grad_norm=0.5): "
        "set TrainingArguments(max_grad_norm=0.0)",
    ),
    (
        {"max_grad_norm": 1.0},
        {"max_grad_norm": 0.5, "sampler": "uniform"},
        "gradients would be clipped twice, by TrainingArguments(max_grad_norm=1.0) and by Grass(max_grad_norm=0.5): "
        "set TrainingArguments(max_grad_norm=0.0)",
    ),
    (
        {"max_grad_norm": 2.0},
        {},
        "TrainingArguments(max_grad_norm=2.0) clips before Grass measures importance: "
        "set TrainingArguments(max_grad_norm=0.0) and Grass(max_grad_norm=2.0)",
    ),
    (
        {"label_smoothing_factor": 0.1},
        {},
        "TrainingArguments(label_smoothing_factor=0.1): the probe sees only the model's own loss; "
        "call opt.probe(batches, loss) before trainer.train()",
    ),
    (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"train_embedding": False},
        "re-entrant gradient checkpointing cannot start below a frozen embedding: "
        'set TrainingArguments(gradient_checkpointing_kwargs={"use_reentrant": False})',
    ),
    (
        # torch takes the re-entrant kind where it is told nothing
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"preserve_rng_state": True}},
        {"train_embedding": False},
        "re-entrant gradient checkpointing cannot start below a frozen embedding: "
        'set TrainingArguments(gradient_checkpointing_kwargs={"use_reentrant": False})',
    ),
]


@pytest.mark.parametrize(("settings", "options", "said"), REFUSED)
def test_a_setting_under_which_grass_is_not_grass_is_refused(
    settings: dict[str, Any], options: dict[str, Any], said: str, tmp_path: Path
) -> None:
    opt = grass(llama(), **options)
    with pytest.raises(ValueError) as caught:
        trainer_of(opt, tmp_path, **settings).train()
    assert str(caught.value) == said
    assert (opt.steps, opt.importance) == (0, None)


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("fp16", True, "TrainingArguments(fp16=True) scales the gradients that Grass measures: use bf16=True"),
        (
            "torch_compile",
            True,
            "TrainingArguments(torch_compile=True) would compile anew at every draw of layers: set torch_compile=False",
        ),
        (
            "fsdp",
            True,
            "TrainingArguments(fsdp=...) shards the layers that Grass puts to sleep: train without it",
        ),
        ("deepspeed_plugin", object(), "DeepSpeed shards or replaces the optimizer: train without it"),
        (
            "world_size",
            2,
            "GRASS trains in one process, not 2: start Trainer without a distributed launcher",
        ),
        ("n_gpu", 2, "GRASS trains on one GPU, Trainer sees 2: set CUDA_VISIBLE_DEVICES to one"),
    ],
)
def test_what_this_machine_cannot_run_is_refused(
    setting: str, value: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting is made once the Trainer stands: with it, the Trainer would fail here in its own way."""
    opt = grass(llama())
    trainer = trainer_of(opt, tmp_path)
    monkeypatch.setattr(TrainingArguments, setting, value, raising=False)
    trainer.args.__dict__.pop(setting, None)
    with pytest.raises(ValueError) as caught:
        trainer.train()
    assert str(caught.value) == said
    assert (opt.steps, opt.importance) == (0, None)


def test_an_optimizer_that_is_not_the_trainers_is_refused(tmp_path: Path) -> None:
    opt = grass(llama())
    adamw = torch.optim.AdamW(opt.model.parameters())
    said = r"Trainer does not train with the optimizer of GrassCallback: give optimizers=\(opt, None\)"
    with pytest.raises(ValueError, match=said):
        trainer_of(opt, tmp_path, optimizer=adamw).train()
    with pytest.raises(ValueError, match=said):
        trainer_of(opt, tmp_path, optimizer=grass(opt.model)).train()


def test_an_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    opt = grass(llama())
    trainer = trainer_of(opt, tmp_path)
    opt.model = llama()
    with pytest.raises(ValueError, match="Grass was built over another model than Trainer's: give both the same one"):
        trainer.train()


def test_a_probe_of_no_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="probe_batches must be at least 1, not 0"):
        GrassCallback(grass(llama()), probe_batches=0)
