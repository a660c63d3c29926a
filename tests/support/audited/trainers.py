"""Scripts in a `transformers.Trainer`, sound and broken."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from grass_tiny import batch, llama
from harness.audit import Audit, AuditCallback

from audited.common import BROKEN, FORGOTTEN, SOUND, adamw, sound, switch
from audited.in_backward import update_in_backward


def one_for_each_parameter(model: Any) -> torch.optim.Optimizer:
    """As transformers does it for its layer-wise optimizers: Trainer steps a stand-in that does nothing."""
    from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

    each = update_in_backward(model)
    stand_in: torch.optim.Optimizer = LayerWiseDummyOptimizer(optimizer_dict=each, model=model)
    return stand_in


@sound
def trainer(
    path: Path,
    *,
    forgets: bool = False,
    resume: bool = False,
    at: str = "on_step_begin",
    build: Callable[[Any], torch.optim.Optimizer] = lambda model: adamw(model.parameters(), lr=5e-2),
    **settings: Any,
) -> Audit:
    """LISA as a callback; with `forgets`, layers are frozen before Trainer collects its parameters."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    def draw(self: Any, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        if state.global_step % 3 == 0:
            switch(model, random.Random(state.global_step).sample(range(4), 2))

    model = llama()
    if forgets:
        switch(model, [0, 1])
    rows = [{key: value[0] for key, value in batch(seed).items()} for seed in range(16)]
    fixed: dict[str, Any] = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    usual = {"max_steps": 12, "per_device_train_batch_size": 2, "learning_rate": 5e-2, "save_strategy": "no"}

    def train(steps: int, *, again: bool = False) -> Audit:
        watch = AuditCallback()
        arguments = TrainingArguments(str(path), **{**usual, **fixed, **settings, "max_steps": steps})
        callbacks = [type("Lisa", (TrainerCallback,), {at: draw})(), watch]
        given = {} if forgets else {"optimizers": (build(model), None)}
        Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=callbacks, **given).train(
            resume_from_checkpoint=again or None
        )
        assert watch.audit is not None
        return watch.audit

    first = train(6 if resume else 12)
    return train(12, again=True) if resume else first


_BEST: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
SOUND["trainer_loads_the_best"] = partial(trainer, **_BEST, load_best_model_at_end=True)
SOUND["trainer_accumulates"] = partial(trainer, gradient_accumulation_steps=2)
SOUND["trainer_switches_before_the_update"] = partial(trainer, at="on_pre_optimizer_step")
SOUND["trainer_switches_after_the_update"] = partial(trainer, at="on_optimizer_step")
SOUND["trainer_switches_between_micro_batches"] = partial(trainer, at="on_substep_end", gradient_accumulation_steps=4)
SOUND["trainer_updates_in_backward"] = partial(trainer, build=one_for_each_parameter)
SOUND["trainer_resumes"] = partial(trainer, resume=True, save_strategy="steps", save_steps=3)

BROKEN["trainer_freezes_first"] = partial(trainer, forgets=True), FORGOTTEN
BROKEN["trainer_freezes_first_and_loads_the_best"] = (
    partial(trainer, **_BEST, load_best_model_at_end=True, forgets=True),
    FORGOTTEN,
)
