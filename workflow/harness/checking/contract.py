"""Checks of one method, each from outside: the harness trains with it as in a study, then inspects the result.

A check returns None if the contract holds, else one sentence. `python -m harness check` runs all checks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from baselines.method import Method
from harness.checking.tiny import tiny_training
from harness.inputs.models import load_model, load_tokenizer
from harness.inputs.prompts import Prompt
from harness.inputs.rows import read_rows
from harness.inputs.tokens import encode_rows
from harness.records.atomic import write_text
from harness.records.reading import read, read_jsonl
from harness.records.run import TrainRecord
from harness.step.attach import attach, method_class, new_method
from harness.study.spec import Observation
from harness.training.loading import Inputs
from harness.training.loop import train
from harness.training.validation import mean_loss

STANDARD = "standard"


@dataclass(frozen=True)
class Case:
    """One method with one set of options on the tiny model."""

    module: str
    options: dict[str, Any]
    inputs: Inputs
    folder: Path
    """Scratch folder of this case."""

    def standard(self) -> TrainRecord:
        """The run that several checks share: 12 steps, seed 0, with the observer; trained once per folder."""
        written = self.folder / "standard.json"
        if not written.exists():
            write_text(written, self.train(STANDARD).model_dump_json())
        return read(written, TrainRecord)

    def train(
        self, name: str, *, seed: int = 0, state: Path | None = None, observe: bool = True, **recipe: Any
    ) -> TrainRecord:
        """Train as a study would; logs and the exported model go to `folder`/`name`."""
        return train(
            tiny_training(self.module, self.options, **{**self.method_class().EXAMPLE_RECIPE, **recipe}),
            name=name,
            lr=self.method_class().EXAMPLE_LR,
            lr_searched=False,
            seed=seed,
            inputs=self.inputs,
            folder=self.folder / name,
            state_folder=state,
            checkpoint_every=4,
            observation=Observation(every_steps=4, rows=2) if observe else None,
        )

    def method_class(self) -> type[Method]:
        """The class under test."""
        return method_class(self.module)


@dataclass(frozen=True)
class Finding:
    """Result of one check; `detail` is None if the contract holds."""

    check: str
    detail: str | None


class KilledError(Exception):
    """ShownBeside for a killed process."""


def options_survive_the_config(case: Case) -> str | None:
    """Options written to a spec and read back are the same."""
    config = case.method_class().Config
    options = config.model_validate(case.options)
    again = config.model_validate_json(options.model_dump_json())
    return None if again == options else f"{options} became {again}"


def promises_hold(case: Case) -> str | None:
    """The engagement verdict of a run is clean."""
    record = case.standard()
    return None if record.status == "ok" else f"{record.status}: {record.status_why}"


def loss_falls(case: Case) -> str | None:
    """Thirty steps on 64 rows lower the loss by at least 2 %; a method that takes no step leaves it unchanged."""
    record = case.train("falls", steps=30, observe=False)
    steps = read_jsonl(case.folder / "falls" / "steps.jsonl")
    if not case.method_class().TRAINS:
        return None if not steps and record.steps_done == 0 else "steps were taken"
    first, last = steps[0]["loss"], sum(s["loss"] for s in steps[-5:]) / 5
    return None if last < 0.98 * first else f"loss went from {first:.3f} to {last:.3f}"


def one_seed_repeats(case: Case) -> str | None:
    """Two runs with the same seed end in the same weights, bit for bit."""
    case.standard(), case.train("repeated")
    return _difference(case, STANDARD, "repeated")


def two_seeds_differ(case: Case) -> str | None:
    """Another seed gives other weights, unless no step is taken."""
    case.standard(), case.train("seed-1", seed=1, observe=False)
    same = _difference(case, STANDARD, "seed-1") is None
    return "seeds 0 and 1 end in the same weights" if same and case.method_class().TRAINS else None


def resume_equals_straight(case: Case) -> str | None:
    """A run killed after step 6 and resumed from its last state ends like an uninterrupted run, bit for bit."""
    method_class = case.method_class()
    if not method_class.TRAINS:
        return None
    case.standard()
    original = method_class.begin_step

    def dies(method: Method, step: int) -> None:
        if step == 6:
            raise KilledError
        original(method, step)

    state = case.folder / "state"
    method_class.begin_step = dies  # type: ignore[method-assign,assignment]
    try:
        case.train("resumed", state=state)
        return "the run was to be killed at step 6 but went on"
    except KilledError:
        pass
    finally:
        if "begin_step" in vars(method_class):
            method_class.begin_step = original  # type: ignore[method-assign]
    record = case.train("resumed", state=state)
    if "resumed after step 4" not in record.notes:
        return f"the second run did not resume: notes {record.notes}"
    if record.status != "ok":
        return f"the resumed run is {record.status}: {record.status_why}"
    return _difference(case, STANDARD, "resumed")


def observer_leaves_no_trace(case: Case) -> str | None:
    """With and without the observer probe the weights are the same, bit for bit."""
    case.standard(), case.train("unobserved", observe=False)
    return _difference(case, STANDARD, "unobserved")


def export_is_what_was_trained(case: Case) -> str | None:
    """Plain transformers loads the exported folder and finds the validation loss that the trained module had."""
    record = case.standard()
    if record.checkpoint is None:
        return f"nothing was exported: the run is {record.status}: {record.status_why}"
    model, tokenizer = load_model(Path(record.checkpoint), weight_dtype="fp32"), load_tokenizer(Path(record.checkpoint))
    rows, _ = encode_rows(
        Prompt("llm-adapters", tokenizer),
        read_rows(case.inputs.rows / "validation.json"),
        max_length=record.recipe["max_length"],
        loss_on="answer",
    )
    loss = mean_loss(model, rows, tokens_at_once=4096, pad_id=tokenizer.pad_token_id)
    assert record.validation_loss is not None
    gap = abs(loss - record.validation_loss)
    return None if gap < 1e-4 else f"validation loss {record.validation_loss:.6f} in training, {loss:.6f} after export"


def schedule_reaches_every_group(case: Case) -> str | None:
    """After `set_lr_factor(f)` every parameter group has f times its own rate; factors do not compound."""
    method_class = case.method_class()
    if not method_class.TRAINS:
        return None
    training = tiny_training(case.module, case.options, **method_class.EXAMPLE_RECIPE)
    recipe, lr = training.recipe, method_class.EXAMPLE_LR
    method = new_method(case.module, case.options, recipe=recipe, lr=lr, seed=0)
    attach(method, load_model(case.inputs.model, weight_dtype="fp32"))
    if method.optimizer is None:
        return "method.optimizer is None: the harness cannot see whether the schedule arrives"
    before = [group["lr"] for group in method.optimizer.param_groups]
    for factor in (0.5, 0.25):
        method.set_lr_factor(factor)
        rates = [group["lr"] for group in method.optimizer.param_groups]
        if rates != [lr * factor for lr in before]:
            return f"factor {factor} of rates {before} gave {rates}"
    return None


def accumulation_changes_nothing(case: Case) -> str | None:
    """Two micro-batches of 4 rows train like one of 8 as long as both choose the same layers; or the method refuses."""
    refusal = case.train("halves", micro_batch_size=4, observe=False)
    if refusal.status == "skipped":
        said = "accumulation" in (refusal.status_why or "")
        return None if said else f"refused without naming accumulation: {refusal.status_why}"
    case.standard()
    whole, halves = (read_jsonl(case.folder / name / "steps.jsonl") for name in (STANDARD, "halves"))
    drawn = [
        {r["step"]: r["active"] for r in read_jsonl(case.folder / name / "believed.jsonl")}
        for name in (STANDARD, "halves")
    ]
    for one, two in zip(whole, halves, strict=True):
        step = one["step"]
        if drawn[0].get(step) != drawn[1].get(step):
            return None if step else "the first draws differ already"
        if abs(one["loss"] - two["loss"]) > 1e-3 * one["loss"]:
            return f"at step {step} the loss is {one['loss']:.6f} with one micro-batch, {two['loss']:.6f} with two"
    return None


CHECKS: tuple[Callable[[Case], str | None], ...] = (
    options_survive_the_config,
    promises_hold,
    loss_falls,
    one_seed_repeats,
    two_seeds_differ,
    resume_equals_straight,
    observer_leaves_no_trace,
    export_is_what_was_trained,
    schedule_reaches_every_group,
    accumulation_changes_nothing,
)


FAMILY_CHECKS = (promises_hold, resume_equals_straight, export_is_what_was_trained)
"""Checks that run on every model family: the others do not depend on the architecture."""


def run_check(check: Callable[[Case], str | None], case: Case) -> Finding:
    """Run one check; an exception in it becomes its finding, so that one defect does not hide others."""
    try:
        detail = check(case)
    except Exception as error:  # noqa: BLE001  any exception of a broken method is the check's finding
        detail = f"{type(error).__name__}: {error}"
    return Finding(check.__name__, detail)


def _weights(case: Case, name: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    folder = case.folder / name / "model"
    # a method that takes no step exports nothing: its checkpoint is the original model
    folder = folder if folder.exists() else case.inputs.model
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def _difference(case: Case, one: str, other: str) -> str | None:
    first, second = _weights(case, one), _weights(case, other)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    return f"{len(different)} of {len(first)} tensors differ between {one} and {other}" if different else None
