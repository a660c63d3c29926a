"""GRASS in a `transformers.Trainer`, in three lines.

opt = Grass(model, lr=2e-5, active_layers=4, max_grad_norm=1.0)
trainer = Trainer(model, args, train_dataset=rows, optimizers=(opt, None), callbacks=[GrassCallback(opt)])
trainer.train()

Set `max_grad_norm=0.0` in `args` (its default is 1.0): Trainer clips before the optimizer's step, Grass inside it,
after measuring. Grass uses its own learning rate and AdamW constants and ignores Trainer's `learning_rate`,
`weight_decay` and `adam_*`; Trainer's schedule and warm-up act on Grass's rate. A Trainer checkpoint holds everything a
bit-exact resume needs. Read probabilities from `opt`, not from Trainer's logs: `Trainer.log` stores a record before any
callback sees it (transformers 5.17).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grass.backward import checkpointing_is_reentrant, stop_at_lowest_layer
from grass.optimizer import Grass


class GrassCallback(TrainerCallback):  # type: ignore[misc]
    """Probes before the first step, and rejects Trainer settings that would break GRASS.

    The probe consumes no step of the schedule, no row of the training data and no random number of a global generator:
    a run with it sees the same batches in the same order, and the same learning rates, as a run without. It is skipped
    if the sampler needs no probe, if a checkpoint was resumed, or if `opt.probe` was called before. If Trainer has a
    custom `compute_loss_func` or `compute_loss`, call `opt.probe` with that `loss` yourself: a callback sees only the
    model's own loss.

    Args:
        opt: the optimizer that the Trainer was given in `optimizers=(opt, None)`.
        probe_batches: T_p, a number of batches of the per-device size, drawn from the training dataset through the
            Trainer's collator (paper: probing steps; 50 is ours), or the batches themselves.

    Raises:
        ValueError: `probe_batches` is a number below 1; when training begins, a setting is rejected: the message names
            it and says how to fix it.
    """

    def __init__(self, opt: Grass, probe_batches: int | Iterable[Any] = 50) -> None:
        if isinstance(probe_batches, int) and probe_batches < 1:
            raise ValueError(f"probe_batches must be at least 1, not {probe_batches}")
        self.opt = opt
        self.probe_batches = probe_batches

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train_dataloader: DataLoader[Any],
        **_: Any,
    ) -> None:
        """Check the settings, then probe; by now a checkpoint has been loaded, and there are no gradients."""
        _refuse(args, self.opt, model, optimizer, resumed_at=state.global_step)
        self.opt.accumulation_steps = args.gradient_accumulation_steps
        if not checkpointing_is_reentrant(model):
            stop_at_lowest_layer(model)
        if not self.opt.needs_probe or self.opt.importance is not None:
            return
        if args.label_smoothing_factor:
            raise ValueError(
                f"TrainingArguments(label_smoothing_factor={args.label_smoothing_factor}): the probe sees only the "
                "model's own loss; call opt.probe(batches, loss) before trainer.train()"
            )
        batches = self._batches(args, state, train_dataloader)
        model.train()
        with _randomness_untouched(model):
            self.opt.probe(send_to_device(batch, args.device) for batch in batches)

    def _batches(
        self, args: TrainingArguments, state: TrainerState, train_dataloader: DataLoader[Any]
    ) -> Iterable[Any]:
        if not isinstance(self.probe_batches, int):
            return self.probe_batches
        dataset = train_dataloader.dataset
        if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
            raise ValueError(
                f"probe_batches={self.probe_batches} cannot be drawn from an IterableDataset without using up its "
                "rows; give batches: GrassCallback(opt, probe_batches=[...])"
            )
        generator = torch.Generator().manual_seed(args.seed if args.data_seed is None else args.data_seed)
        # if the dataset has fewer rows, the sampler goes through it again in another order
        rows = RandomSampler(dataset, num_samples=self.probe_batches * state.train_batch_size, generator=generator)
        return DataLoader(
            dataset,
            batch_size=state.train_batch_size,
            sampler=rows,
            collate_fn=train_dataloader.collate_fn,
            generator=generator,
        )


def _refuse(
    args: TrainingArguments, opt: Grass, model: nn.Module, optimizer: torch.optim.Optimizer, *, resumed_at: int
) -> None:
    trained_by = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    for found, sentence in (
        (args.deepspeed_plugin, "DeepSpeed shards or replaces the optimizer: train without it"),
        (args.fsdp, "TrainingArguments(fsdp=...) shards the layers that Grass puts to sleep: train without it"),
        (
            args.world_size > 1,
            f"GRASS trains in one process, not {args.world_size}: start Trainer without a distributed launcher",
        ),
        (args.n_gpu > 1, f"GRASS trains on one GPU, Trainer sees {args.n_gpu}: set CUDA_VISIBLE_DEVICES to one"),
        (
            trained_by is not opt,
            "Trainer does not train with the optimizer of GrassCallback: give optimizers=(opt, None)",
        ),
        (model is not opt.model, "Grass was built over another model than Trainer's: give both the same one"),
        (args.fp16, "TrainingArguments(fp16=True) scales the gradients that Grass measures: use bf16=True"),
        (
            args.torch_compile,
            "TrainingArguments(torch_compile=True) would compile anew at every draw of layers: set torch_compile=False",
        ),
        (
            args.max_grad_norm > 0 and opt.options.max_grad_norm is not None,
            f"gradients would be clipped twice, by TrainingArguments(max_grad_norm={args.max_grad_norm}) and by "
            f"Grass(max_grad_norm={opt.options.max_grad_norm}): set TrainingArguments(max_grad_norm=0.0)",
        ),
        (
            args.max_grad_norm > 0 and opt.needs_probe,
            f"TrainingArguments(max_grad_norm={args.max_grad_norm}) clips before Grass measures importance: set "
            f"TrainingArguments(max_grad_norm=0.0) and Grass(max_grad_norm={args.max_grad_norm})",
        ),
        (
            checkpointing_is_reentrant(model) and _embedding_is_frozen(model),
            "re-entrant gradient checkpointing cannot start below a frozen embedding: set "
            'TrainingArguments(gradient_checkpointing_kwargs={"use_reentrant": False})',
        ),
        (
            resumed_at > 0 and opt.untouched,
            f"Trainer resumes at step {resumed_at} from a checkpoint without the optimizer's state, so that moments, "
            "importance and schedule would begin anew: resume one saved with TrainingArguments(save_only_model=False), "
            "or begin a new run from its weights",
        ),
    ):
        if found:
            raise ValueError(sentence)


def _embedding_is_frozen(model: Any) -> bool:
    return not any(p.requires_grad for p in model.get_input_embeddings().parameters())


@contextmanager
def _randomness_untouched(model: nn.Module) -> Iterator[None]:
    """Leave the global generators of Python, NumPy, torch and the model's devices as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices, device_type="cuda"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
