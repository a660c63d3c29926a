"""GRASS under the real `transformers.Trainer` and accelerate."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from grass_tiny import batch, grass_of, llama, same, train, weights
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainingArguments, get_linear_schedule_with_warmup

from grass import Grass
from grass.hf import GrassCallback

Batch = dict[str, Tensor]
ROWS: list[dict[str, Any]] = [
    # a column that the model does not take: the Trainer's collator drops it, the probe's must as well
    {**{name: value[0] for name, value in batch(seed).items()}, "text": f"row {seed}"}
    for seed in range(14)
]

NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def _accelerate_starts_afresh() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


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


class KilledError(Exception):
    pass


class Kill(TrainerCallback):
    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.after:
            raise KilledError


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
@pytest.mark.parametrize("sampler", ["importance", "static", "uniform"])
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


@pytest.mark.parametrize(
    ("killed_after", "settings"),
    [
        (4, {}),
        (5, {}),
        (7, {}),
        (9, {"bf16": True, "gradient_checkpointing": True}),
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
