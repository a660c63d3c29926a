"""Checkpoints of the Trainer and states under accelerate: GRASS resumes to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from further import a_few
from grass_tiny import grass_of, llama, same, train, weights
from safetensors.torch import load_file
from torch import Tensor
from trainer_runs import NEEDS_CUDA, ROWS, grass, trainer_of, with_dropout
from transformers import TrainerCallback

from grass.hf import GrassCallback


@pytest.fixture(autouse=True)
def _accelerate_starts_afresh() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class KilledError(Exception):
    pass


class Kill(TrainerCallback):
    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.after:
            raise KilledError


def alike(one: Any, other: Any) -> bool:
    """Equal in structure, types, dtypes, devices and every bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


@pytest.mark.parametrize(
    ("killed_after", "settings"),
    [
        *a_few([(5, {}), (4, {}), (7, {}), (9, {"bf16": True, "gradient_checkpointing": True})], one_in=3),
        pytest.param(7, {"use_cpu": False}, marks=NEEDS_CUDA),
    ],
)
def test_a_killed_run_resumes_to_the_last_bit(killed_after: int, settings: dict[str, Any], tmp_path: Path) -> None:
    """From the checkpoints of steps 2 (between two draws), 4 (end of an epoch), 6 (draw and refresh) and 8."""
    settings = {**settings, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    options: dict[str, Any] = {"max_grad_norm": 0.5, "refresh_every": 6, "temperature": 0.2}
    straight = grass(with_dropout(llama()), **options)
    trainer_of(straight, tmp_path / "straight", **settings).train()

    killed = grass(with_dropout(llama()), **options)
    callbacks = [GrassCallback(killed, probe_batches=4), Kill(killed_after)]
    with pytest.raises(KilledError):
        trainer_of(killed, tmp_path / "killed", callbacks=callbacks, **settings).train()

    # another seed of the draws, and a probe that would fail: everything must come from the checkpoint
    resumed = grass(with_dropout(llama()), seed=99, **options)
    callbacks = [GrassCallback(resumed, probe_batches=[])]
    trainer = trainer_of(resumed, tmp_path / "killed", callbacks=callbacks, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == resumed.steps == 10
    assert same(weights(resumed.model), weights(straight.model))
    assert alike(resumed.state_dict(), straight.state_dict())


@pytest.mark.parametrize("sampler", ["importance", "uniform"])
def test_a_checkpoint_without_optimizer_state_is_not_resumed(sampler: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "save_only_model": True}
    trainer_of(grass(llama(), sampler=sampler), tmp_path, max_steps=4, **settings).train()
    resumed = grass(llama(), sampler=sampler)
    before = resumed.steps
    said = (
        r"resumes at step 4 from a checkpoint without the optimizer's state, .*save_only_model=False\), or begin a new"
    )
    with pytest.raises(ValueError, match=said):
        trainer_of(resumed, tmp_path, **settings).train(resume_from_checkpoint=True)
    assert resumed.steps == before == 0


def test_the_best_weights_are_loaded_at_the_end(tmp_path: Path) -> None:
    opt = grass(llama())
    # the worst loss counts as best, so that the last step is not the best one
    trainer = trainer_of(
        opt,
        tmp_path,
        rows=ROWS[:4],
        held_out=ROWS[:4],
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert not best.endswith("-10")
    assert same(weights(opt.model), load_file(Path(best) / "model.safetensors"))
    awake = [all(p.requires_grad for p in parameters) for parameters in opt.layer_parameters]
    assert awake == [layer in opt.active for layer in range(4)]


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sampler", ["importance", "uniform"])
def test_accelerate_prepares_the_optimizer_without_changing_it(
    sampler: Any, dtype: torch.dtype, steps: int, tmp_path: Path
) -> None:
    """`prepare` sends the state through the device and `load_state_dict`; a file and `weights_only` do as little."""
    model = llama(dtype=dtype)
    opt = grass_of(model, sampler=sampler)
    train(model, opt, 0, steps)
    before, flags = opt.state_dict(), [p.requires_grad for p in model.parameters()]
    torch.save(before, tmp_path / "before.pt")
    prepared = Accelerator(cpu=True).prepare(opt)
    assert prepared.optimizer is opt
    kept = torch.load(tmp_path / "before.pt", weights_only=True)
    assert alike(opt.state_dict(), kept)
    assert alike(prepared.state_dict(), kept)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert bool(opt.state) is (steps > 0)
    moments = [m[key] for m in opt.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert all(m.dtype == torch.float32 for m in moments)
