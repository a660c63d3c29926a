"""One training run, from a resolved spec to a record. Reads top to bottom.

The harness owns the clock, the schedule, the data order and the seeds; the method owns which parameters move. Nothing
here asks which method it is.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from baselines.method import Method, StepFacts, find_method
from grass.layers import find_layers
from harness import durable
from harness.inputs.models import facts_of, load_model, load_tokenizer
from harness.inputs.rows import read_rows
from harness.inputs.tokens import encode_rows
from harness.measuring.meters import MemoryMeters
from harness.progress import Progress
from harness.provenance import provenance
from harness.record import Check, DataUse, Status, Timing, TrainRecord
from harness.sources import training as sources_of
from harness.spec import Observation, Training
from harness.training import resume
from harness.training.batches import Batches, CalibrationBatches, fixed_batches, mean_loss
from harness.training.engagement import Watch, verdict
from harness.training.loss import label_tokens, token_loss
from harness.training.observer import Observer
from harness.training.schedule import lr_factor

WARMUP_SHARE = 0.1
"""Share of the steps left out of the throughput, at least `MIN_WARMUP`."""
MIN_WARMUP = 3
FALLBACK_PERIODS = 4
"""Periods in which methods without a period of their own are watched."""


@dataclass(frozen=True)
class Inputs:
    """Where a run finds what it reads: folders that earlier jobs made."""

    model: Path
    rows: Path
    model_text: str = ""
    """The model's folder as its manifest words it, with no path of this machine in it."""


@dataclass
class Log:
    """What a run has written down so far; part of the resume state."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    believed: list[dict[str, Any]] = field(default_factory=list)
    observed: list[dict[str, Any]] = field(default_factory=list)
    prepare_s: float = 0.0


class Diverged(Exception):
    """The loss or the gradient norm is not finite any more."""


def train(
    training: Training,
    *,
    name: str,
    lr: float | None,
    lr_searched: bool,
    seed: int,
    inputs: Inputs,
    folder: Path | None,
    state_folder: Path | None = None,
    checkpoint_every: int = 100,
    observation: Observation | None = None,
) -> TrainRecord:
    """Train once and say how it went; a bad outcome is a record, a bad program raises.

    Args:
        training: model, rows, method and recipe.
        name: of the run, for the record and the progress line.
        lr: peak learning rate; None for a method that takes no step.
        lr_searched: whether it comes from a search.
        seed: of data order, initialisation of adapters, dropout and the method's own draws.
        inputs: folders of model and rows.
        folder: where logs and the exported model go; None keeps nothing (a trial of a search).
        state_folder: where resume state lives; None cannot resume.
        checkpoint_every: steps between two writes of the resume state.
        observation: the observer probe; None switches it off.
    """
    recipe = training.recipe
    torch.manual_seed(seed)
    run = _Run(training, name=name, lr=lr, seed=seed, inputs=inputs, observation=observation)
    status, why, checkpoint = _attempt(run, folder, state_folder, checkpoint_every)
    checks = run.checks if status == "ok" else []
    if status == "ok" and not all(check.ok for check in checks):
        status, why = (
            "disengaged",
            "; ".join(f"{c.name}: promised {c.promised}, saw {c.observed}" for c in checks if not c.ok),
        )
    if folder is not None:
        run.write_logs(folder)
    clipped = [s["clipped"] for s in run.log.steps if s["clipped"] is not None]
    tail = run.log.steps[-max(1, len(run.log.steps) // 10) :]
    return TrainRecord(
        name=name,
        status=status,
        status_why=why,
        model=training.model.label,
        task=training.rows.label,
        method=training.label,
        module=training.module,
        options=training.options,
        seed=seed,
        recipe=recipe.model_dump(mode="json"),
        recipe_changes=list(training.recipe_changes),
        lr=lr,
        lr_searched=lr_searched,
        steps_done=len(run.log.steps),
        checkpoint=checkpoint,
        checkpoint_why=None if checkpoint else (why or "nothing is kept of a trial"),
        parameters=run.parameters,
        trainable_parameters=run.trainable_parameters,
        train_loss=_finite(float(np.mean([s["loss"] for s in tail]))) if tail else None,
        validation_loss=_finite(run.validation_loss),
        clipped_share=float(np.mean(clipped)) if clipped else None,
        data=run.data,
        timing=run.timing(),
        memory=run.meters.record(state_peak_bytes=max((p.state_bytes for p in run.periods), default=None)),
        engagement=checks,
        notes=run.notes,
        provenance=provenance(sources=sources_of(training.module), inputs=run.input_files(), device=run.device_name()),
    )


def _attempt(
    run: _Run, folder: Path | None, state_folder: Path | None, every: int
) -> tuple[Status, str | None, str | None]:
    """Status, its reason, and the exported model's folder."""
    try:
        with run.phase("load"):
            why = run.load()
        if why is not None:
            return "skipped", why, None
        run.resume_or_prepare(state_folder)
        run.steps(state_folder, every)
        run.validation_loss = run.final_loss()
        if not math.isfinite(run.validation_loss):
            raise Diverged(f"validation loss is {run.validation_loss}")
        with run.phase("save"):
            return "ok", None, run.export(folder)
    except Diverged as error:
        return "diverged", str(error), None
    except (torch.OutOfMemoryError, MemoryError) as error:
        return (
            "oom",
            f"in phase {run.current_phase}: {str(error).splitlines()[0] if str(error) else 'host memory'}",
            None,
        )
    except RuntimeError as error:
        # the CPU allocator has no exception of its own
        if "can't allocate memory" not in str(error):
            raise
        return "oom", f"in phase {run.current_phase}: {str(error).splitlines()[0]}", None


class _Run:
    """The parts of one run; `train` calls them in order."""

    def __init__(
        self,
        training: Training,
        *,
        name: str,
        lr: float | None,
        seed: int,
        inputs: Inputs,
        observation: Observation | None,
    ) -> None:
        self.training, self.recipe, self.name, self.lr, self.seed = training, training.recipe, name, lr, seed
        self.inputs, self.observation = inputs, observation
        self.device = self.recipe.device
        self.meters = MemoryMeters(self.device)
        self.log = Log()
        self.current_phase = "load"
        self.load_s = 0.0
        self.parameters: int | None = None
        self.trainable_parameters: int | None = None
        self.data: DataUse | None = None
        self.validation_loss = math.nan
        self.checks: list[Check] = []
        self.notes: list[str] = []
        self.watch: Watch | None = None

    # ------------------------------------------------------------ load

    def load(self) -> str | None:
        """Load model and rows, attach the method; returns the reason if the method cannot run here."""
        started = time.perf_counter()
        method_class = find_method(self.training.module)
        missing = [p for p in method_class.REQUIRES if importlib.util.find_spec(p) is None]
        if missing:
            return f"needs the package {', '.join(missing)}"
        options = method_class.Config.model_validate(self.training.options, strict=False)
        self.method: Method = method_class(options, recipe=self.recipe, lr=self.lr or 0.0, seed=self.seed)
        tokenizer = load_tokenizer(self.inputs.model)
        encode = {"max_length": self.recipe.max_length, "loss_on": self.recipe.loss_on}
        rows, self.data = encode_rows(tokenizer, read_rows(self.inputs.rows / "train.json"), **encode)  # type: ignore[arg-type]
        encode["loss_on"] = "answer"
        held, _ = encode_rows(tokenizer, read_rows(self.inputs.rows / "validation.json"), **encode)  # type: ignore[arg-type]
        model = load_model(self.inputs.model, weight_dtype=self.recipe.weight_dtype).to(self.device)
        if self.recipe.activation_checkpointing:
            # the re-entrant kind needs an input that requires grad; the hook it installs would force backward to
            # visit every layer below the lowest active one, so it is taken off again
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.disable_input_require_grads()
        self.facts = facts_of(model)
        self.parameters = self.facts.total_parameters
        why = self.method.skip(self.facts)
        if why is not None:
            return why
        pad = tokenizer.pad_token_id
        sizes = {"batch_size": self.recipe.batch_size, "micro_batch_size": self.recipe.micro_batch_size}
        self.batches = Batches(rows, **sizes, seed=self.seed, pad_id=pad, device=self.device)
        self.validation = fixed_batches(held, size=64, pad_id=pad, device="cpu")
        count = self.observation.rows if self.observation else 0
        self.observed_batches = fixed_batches(held[:count], size=self.recipe.micro_batch_size, pad_id=pad, device="cpu")
        layers = find_layers(model)
        self.base_parameters = [p for parameters in layers.layer_parameters() for p in parameters] + [
            p for parameters in layers.outside.values() for p in parameters
        ]
        self.observer = Observer(layers.layer_parameters())
        # from here on every new tensor that stays alive is the method's
        self.watch = Watch(model, layers)
        self.module: nn.Module = self.method.attach(model)
        self.module.train()
        self.watch.attached(self.module)
        self.promise = self.method.expect(self.facts)
        self.trainable_parameters = self.promise.trainable_parameters
        self.total_steps = 0 if self.promise.layers == "none" else self.recipe.steps
        self.period = self.promise.period_steps or max(1, self.recipe.steps // FALLBACK_PERIODS)
        self.load_s = time.perf_counter() - started
        return None

    # ------------------------------------------------------------ prepare

    def resume_or_prepare(self, state_folder: Path | None) -> None:
        """Take up the state of a killed run, or let the method measure what it needs before the first step."""
        self.first_step = 0
        if state_folder is not None:
            found = resume.load(state_folder, self.module)
            if found is not None:
                self.first_step, rest = found
                self.method.load_state_dict(rest["method"])
                self._watch.load_state_dict(rest["watch"])
                self.log = Log(**rest["log"])
                self.notes.append(f"resumed after step {self.first_step}")
                return
        with self.phase("prepare"):
            started = time.perf_counter()
            # dropout in the probe must not shift the random numbers of training
            with torch.random.fork_rng(devices=[torch.cuda.current_device()] if self.device == "cuda" else []):
                self.method.prepare(CalibrationBatches(self.batches))
            self._synchronise()
            self.log.prepare_s = time.perf_counter() - started

    # ------------------------------------------------------------ steps

    def steps(self, state_folder: Path | None, checkpoint_every: int) -> None:
        """All optimizer steps, the observer and the engagement watch between them."""
        if self.first_step == 0:
            self._observe(0)
        with (
            Progress(self.total_steps, self.name, done=self.first_step) if self.total_steps else _nothing() as progress
        ):
            for step in range(self.first_step, self.total_steps):
                with self.phase("first_step" if step == 0 else "steady"):
                    loss = self._step(step)
                done = step + 1
                if done % self.period == 0 or done == self.total_steps:
                    self._watch.end_period(step)
                if self.observation and (done % self.observation.every_steps == 0 or done == self.total_steps):
                    self._observe(done)
                if state_folder is not None and done % checkpoint_every == 0 and done < self.total_steps:
                    self._save(state_folder, done)
                if progress is not None:
                    progress.advance(f"loss {loss:.3f}")
        self.checks = verdict(self.promise, self.facts, self.periods, coarse_weights=self.recipe.weight_dtype == "bf16")

    def _step(self, step: int) -> float:
        """One optimizer step; returns the mean loss per label token."""
        starts_period = step % self.period == 0
        started = time.perf_counter()
        factor = lr_factor(step, self.recipe)
        self.method.set_lr_factor(factor)
        self.method.begin_step(step)
        trace = self.method.trace()
        self._log_belief(step, trace)
        watching = 0.0
        if starts_period:
            watching += self._timed(lambda: self._watch.start_period(step, trace))
        micro_batches = self.batches.step(step)
        targets = sum(label_tokens(batch) for batch in micro_batches)
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(micro_batches):
            loss = token_loss(self.module, batch) / targets
            self.method.backward(loss, last=number == len(micro_batches) - 1)
            total += loss.detach()
        if starts_period:
            watching += self._timed(self._watch.before_update)
        facts = self.method.end_step(lambda: self._replay(micro_batches, targets))
        self._synchronise()
        spent = time.perf_counter() - started - watching
        mean = float(total)
        self._log_step(step, mean, factor, facts, sum(int(b["attention_mask"].sum()) for b in micro_batches), spent)
        if starts_period:
            del loss, batch, micro_batches, total
            self._watch.after_update()
        return mean

    def _replay(self, micro_batches: Sequence[dict[str, Tensor]], targets: int) -> Iterator[Tensor]:
        return (token_loss(self.module, batch) / targets for batch in micro_batches)

    def _log_step(self, step: int, loss: float, factor: float, facts: StepFacts, tokens: int, spent: float) -> None:
        if not math.isfinite(loss) or (facts.grad_norm is not None and not math.isfinite(facts.grad_norm)):
            raise Diverged(f"at step {step}: loss {loss}, gradient norm {facts.grad_norm}")
        row = {"step": step, "loss": loss, "lr_factor": factor, "grad_norm": facts.grad_norm, "clipped": facts.clipped}
        self.log.steps.append({**row, "tokens": tokens, "step_s": spent})

    def _log_belief(self, step: int, trace: Any) -> None:
        if trace is None:
            return
        row: dict[str, Any] = {"step": step, "active": list(trace.active)}
        for key in ("importance", "probability", "age_steps"):
            value = getattr(trace, key)
            row[key] = None if value is None else list(value)
        last = self.log.believed[-1] if self.log.believed else None
        if last is None or any(row[key] != last[key] for key in ("active", "importance", "probability")):
            self.log.believed.append(row)

    def _observe(self, done: int) -> None:
        if self.observation is None:
            return
        batches = [{k: v.to(self.device) for k, v in batch.items()} for batch in self.observed_batches]
        rms, loss = self.observer.observe(self.module, batches)
        self.log.observed.append({"step": done, "gradient_rms": rms, "validation_loss": loss})

    def _save(self, folder: Path, done: int) -> None:
        frozen = self.base_parameters if self.promise.base_frozen else []
        rest = {"method": self.method.state_dict(), "watch": self._watch.state_dict(), "log": vars(self.log)}
        resume.save(folder, step=done, module=self.module, frozen=frozen, rest=rest)

    # ------------------------------------------------------------ end

    def final_loss(self) -> float:
        """Mean nats per answer token over the whole validation split."""
        return mean_loss(self.module, [{k: v.to(self.device) for k, v in b.items()} for b in self.validation])

    def export(self, folder: Path | None) -> str | None:
        """Write a plain model folder; an untouched model is named where it is."""
        if folder is None:
            return None
        if self.promise.layers == "none":
            return self.inputs.model_text or str(self.inputs.model)
        target = folder / "model"
        with durable.whole_folder(target) as temporary:
            self.method.export(temporary)
            load_tokenizer(self.inputs.model).save_pretrained(temporary)
        return str(target)

    def write_logs(self, folder: Path) -> None:
        """steps, believed, observed and periods, one JSON object a line."""
        durable.write_jsonl(folder / "steps.jsonl", self.log.steps)
        durable.write_jsonl(folder / "believed.jsonl", self.log.believed)
        durable.write_jsonl(folder / "observed.jsonl", self.log.observed)
        durable.write_jsonl(folder / "periods.jsonl", [vars(p) for p in self.periods])

    def timing(self) -> Timing:
        """The clock's figures; throughput is null with a reason where too few steps were made."""
        warmup = max(MIN_WARMUP, round(WARMUP_SHARE * self.total_steps)) if self.log.steps else 0
        timed = self.log.steps[warmup:]
        seconds = np.array([s["step_s"] for s in timed])
        tokens = sum(s["tokens"] for s in timed)
        return Timing(
            load_s=self.load_s,
            prepare_s=self.log.prepare_s,
            train_s=sum(s["step_s"] for s in self.log.steps),
            warmup_steps=warmup,
            step_median_s=float(np.median(seconds)) if timed else None,
            step_p95_s=float(np.quantile(seconds, 0.95)) if timed else None,
            throughput_tokens_per_s=tokens / float(seconds.sum()) if timed else None,
            throughput_why=None if timed else "no step after the warm-up",
            device_synchronised=self.device == "cuda",
        )

    # ------------------------------------------------------------ small

    @property
    def _watch(self) -> Watch:
        assert self.watch is not None
        return self.watch

    @property
    def periods(self) -> list[Any]:
        """Periods that came to their end."""
        return [p for p in self.watch.periods if p.last_step >= 0] if self.watch else []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Meters and error messages of the block go under `name`."""
        self.current_phase = name
        with self.meters.phase(name):
            yield

    def input_files(self) -> dict[str, Path]:
        """What the run read, by role."""
        files = {"train rows": self.inputs.rows / "train.json", "validation rows": self.inputs.rows / "validation.json"}
        files |= {f"model {p.name}": p for p in sorted(self.inputs.model.glob("*.safetensors"))}
        return {role: path for role, path in files.items() if path.exists()}

    def device_name(self) -> str:
        """ "cpu", or the accelerator's name."""
        return torch.cuda.get_device_name() if self.device == "cuda" else "cpu"

    def _synchronise(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    @staticmethod
    def _timed(action: Any) -> float:
        started = time.perf_counter()
        action()
        return time.perf_counter() - started


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
