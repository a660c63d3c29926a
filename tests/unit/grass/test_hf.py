"""GRASS under the real `transformers.Trainer`."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from further import a_few
from grass_tiny import batch, grass_of, llama, same, weights
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from trainer_runs import NEEDS_CUDA, ROWS, Batch, collate, grass, trainer_of, with_dropout
from transformers import Trainer, TrainerCallback, TrainingArguments, get_linear_schedule_with_warmup

from grass import Grass
from grass.hf import GrassCallback


@pytest.fixture(autouse=True)
def _accelerate_starts_afresh() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Watch(TrainerCallback):
    """What training saw after the probe: every micro-batch, and per step the rate and the active layers."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.rates: list[float] = []
        self.active: list[tuple[int, ...]] = []

    def on_train_begin(self, *_: Any, model: nn.Module, **__: Any) -> None:
        model.register_forward_pre_hook(
            lambda _, args, kwargs: self.batches.append(
                {name: kwargs[name].clone() for name in kwargs if name in ROWS[0]}
            ),
            with_kwargs=True,
        )

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        self.rates.append(rate)
        self.active.append(optimizer.optimizer.active)


def test_layers_rotate_and_the_loss_falls_under_the_trainer(tmp_path: Path) -> None:
    model, watch = llama(), Watch()
    opt = Grass(model, lr=1e-2, active_layers=2, sample_every=3, max_grad_norm=1.0)
    args = TrainingArguments(
        str(tmp_path),
        max_grad_norm=0.0,
        max_steps=24,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    callbacks = [GrassCallback(opt), watch]
    trainer = Trainer(
        model, args, train_dataset=ROWS, data_collator=collate, optimizers=(opt, None), callbacks=callbacks
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert opt.steps == len(watch.active) == 24
    assert opt.importance is not None
    assert all(watch.active[i] == watch.active[i - i % 3] for i in range(24))
    assert len(set(watch.active)) > 2


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("sampler", a_few(["importance", "static", "uniform"], one_in=3))
def test_the_trainer_ends_in_the_weights_of_a_plain_loop(sampler: Any, accumulation: int, tmp_path: Path) -> None:
    """To the last bit; the schedule warms up and decays, clipping bites, layers are drawn three times."""
    probe = [batch(-1), batch(-2)]
    mine, watch = llama(), Watch()
    opt = grass(mine, sampler=sampler, max_grad_norm=0.5, weight_decay=0.1)
    callbacks = [GrassCallback(opt, probe_batches=probe), watch]
    trainer_of(opt, tmp_path, callbacks=callbacks, warmup_steps=2, gradient_accumulation_steps=accumulation).train()
    assert opt.accumulation_steps == accumulation

    theirs = llama()
    plain = grass(theirs, sampler=sampler, max_grad_norm=0.5, weight_decay=0.1)
    plain.accumulation_steps = accumulation
    if sampler != "uniform":
        plain.probe(probe)
    schedule = get_linear_schedule_with_warmup(plain, 2, 10)
    steps_per_epoch = len(ROWS) // 2
    batches, active = iter(watch.batches), []
    left = steps_per_epoch
    for _ in range(10):
        micro = [next(batches) for _ in range(min(accumulation, left))]
        left = left - len(micro) or steps_per_epoch
        predicted = sum(b["labels"][:, 1:].numel() for b in micro)
        for b in micro:
            theirs(**b, num_items_in_batch=predicted).loss.backward()
        active.append(plain.active)
        plain.step()
        schedule.step()
        plain.zero_grad()
    assert not list(batches)
    assert same(weights(mine), weights(theirs))
    assert watch.active == active
    assert len(set(active)) > 1
    assert opt.probability == plain.probability


@pytest.mark.parametrize("use_cpu", [True, pytest.param(False, marks=NEEDS_CUDA)])
def test_probing_eats_no_step_no_rate_no_row_and_no_random_number(tmp_path: Path, *, use_cpu: bool) -> None:
    """With all layers awake and dropout in the model, a run with a probe ends as one without, to the last bit."""
    seen = []
    for sampler in ("uniform", "importance"):
        model, watch = with_dropout(llama()), Watch()
        opt = grass(model, sampler=sampler, active_layers=4)
        callbacks = [GrassCallback(opt, probe_batches=20), watch]
        trainer = trainer_of(opt, tmp_path, callbacks=callbacks, warmup_steps=3, use_cpu=use_cpu)
        trainer.train()
        assert (opt.importance is None) is (sampler == "uniform")
        seen.append((watch, weights(model), opt.steps, trainer.state.global_step))
    (plain, ends, *steps), (probed, probed_ends, *probed_steps) = seen
    assert plain.rates == probed.rates
    assert len(set(plain.rates)) > 3
    assert steps == probed_steps == [10, 10]
    assert len(plain.batches) == 10
    assert all(same(one, other) for one, other in zip(plain.batches, probed.batches, strict=True))
    assert same(ends, probed_ends)


def test_the_probe_draws_rows_of_the_training_data_in_an_order_of_its_own(tmp_path: Path) -> None:
    """As many batches as asked for, of the per-device size, going round again where the rows do not suffice."""
    orders = []
    for data_seed in (None, 7):
        model, probed, watch = llama().eval(), [], Watch()
        opt = grass(model)
        trainer = trainer_of(
            opt, tmp_path, callbacks=[GrassCallback(opt, probe_batches=9), watch], max_steps=7, data_seed=data_seed
        )
        model.register_forward_pre_hook(
            lambda model, _, kwargs, probed=probed: probed.append((model.training, kwargs)), with_kwargs=True
        )
        trainer.train()
        assert all(training and kwargs.keys() == {"input_ids", "labels"} for training, kwargs in probed[:9])
        order = [kwargs["input_ids"].tolist() for _, kwargs in probed[:9]]
        assert len(probed) == 9 + len(watch.batches)
        known = sorted(row["input_ids"].tolist() for row in ROWS)
        assert sorted(row for ids in order[:7] for row in ids) == known
        assert sorted(row for b in watch.batches for row in b["input_ids"].tolist()) == known
        assert order[:7] != [b["input_ids"].tolist() for b in watch.batches]
        assert all(len(ids) == 2 for ids in order)
        orders.append(order)
    assert orders[0] != orders[1]


def test_a_collator_that_throws_dice_leaves_the_global_generators_alone(tmp_path: Path) -> None:
    def states() -> list[Any]:
        return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]

    def throws(rows: Sequence[dict[str, Any]]) -> Batch:
        random.random()
        np.random.rand()
        torch.rand(())
        return collate(rows)

    class Compare(TrainerCallback):
        def __init__(self) -> None:
            self.states: list[Any] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.states.append(states())

    opt, compare = grass(with_dropout(llama())), Compare()
    trainer = trainer_of(opt, tmp_path, callbacks=[compare, GrassCallback(opt, probe_batches=4), compare], max_steps=1)
    trainer.data_collator = throws
    trainer.train()
    before, after = compare.states
    assert opt.importance is not None
    assert before == after


def test_a_probe_made_by_hand_is_not_made_again(tmp_path: Path) -> None:
    opt = grass_of(llama())
    assert opt.importance is not None
    probed = list(opt.importance.values)
    trainer_of(opt, tmp_path, callbacks=[GrassCallback(opt, probe_batches=[])], max_steps=1).train()
    assert opt.importance.values == probed


def test_under_bf16_the_probe_sees_the_autocast_of_training(tmp_path: Path) -> None:
    probe = [batch(-1), batch(-2)]
    model = llama()
    opt = grass(model)
    dtypes: list[torch.dtype] = []
    model.model.layers[0].mlp.register_forward_hook(lambda *args: dtypes.append(args[2].dtype))
    trainer_of(opt, tmp_path, callbacks=[GrassCallback(opt, probe_batches=probe)], bf16=True, max_steps=2).train()
    assert dtypes == [torch.bfloat16] * 4

    def loss(model: Any, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            value: Tensor = model(**batch).loss
        return value

    plain = grass(llama())
    plain.probe(probe, loss)
    assert opt.importance == plain.importance
    exact = grass(llama())
    exact.probe(probe)
    assert opt.importance != exact.importance


@pytest.mark.parametrize("train_embedding", [False, True])
def test_gradient_checkpointing_changes_nothing_and_stops_at_the_lowest_layer(
    tmp_path: Path, *, train_embedding: bool
) -> None:
    ends = []
    for checkpointing in (False, True):
        model = with_dropout(llama())
        wants: set[bool] = set()
        model.model.layers[0].register_forward_pre_hook(lambda _, args, wants=wants: wants.add(args[0].requires_grad))
        opt = grass(model, train_embedding=train_embedding)
        trainer_of(opt, tmp_path, gradient_checkpointing=checkpointing).train()
        # the probe measures layers alone, whether the embedding trains or not
        assert wants == {False, train_embedding}
        ends.append(weights(model))
    assert same(*ends)


def test_reentrant_checkpointing_works_above_an_embedding_that_trains(tmp_path: Path) -> None:
    ends = []
    for checkpointing in (False, True):
        opt = grass(with_dropout(llama()))
        settings = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
        trainer_of(opt, tmp_path, **settings).train()
        ends.append((weights(opt.model), opt.importance))
    assert same(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


class Stream(IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(ROWS * 2)


def test_a_stream_of_rows_is_trained_on_with_batches_given_for_the_probe(tmp_path: Path) -> None:
    opt, watch = grass(llama()), Watch()
    with pytest.raises(ValueError) as caught:
        trainer_of(opt, tmp_path, rows=Stream()).train()
    assert str(caught.value) == (
        "probe_batches=4 cannot be drawn from an IterableDataset without using up its rows; "
        "give batches: GrassCallback(opt, probe_batches=[...])"
    )
    given = (batch(seed) for seed in (-1, -2))
    trainer_of(opt, tmp_path, rows=Stream(), callbacks=[GrassCallback(opt, given), watch]).train()
    assert opt.importance is not None
    rows = [row for b in watch.batches for row in b["input_ids"].tolist()]
    assert rows == [row["input_ids"].tolist() for row in ROWS * 2][:20]


def test_a_sampler_that_measures_nothing_may_leave_clipping_to_the_trainer(tmp_path: Path) -> None:
    ends = []
    for clips in ("trainer", "grass", "nobody"):
        opt = grass(llama(), sampler="uniform", max_grad_norm=0.5 if clips == "grass" else None)
        trainer_of(opt, tmp_path, max_grad_norm=0.5 if clips == "trainer" else 0.0).train()
        ends.append(weights(opt.model))
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])
