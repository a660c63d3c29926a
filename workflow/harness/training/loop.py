"""One training run, from a resolved spec to a record. Reads top to bottom.

The harness owns the clock, the schedule, the data order and the seeds; the method decides which parameters train.
Nothing here depends on which method it is.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from grass.distributed import ranks
from harness import sign
from harness.measuring.clock import StepClock
from harness.measuring.energy import together
from harness.measuring.host import free_bytes
from harness.measuring.meters import Meters
from harness.progress import Progress, say
from harness.records.claim import claim, with_code
from harness.records.code import training as roots_of
from harness.records.held import hashes
from harness.records.provenance import provenance
from harness.records.run import Check, Status, TrainRecord
from harness.step import resume
from harness.step.outcomes import CannotRunError, DivergedError, outcome_of
from harness.step.run import run_step
from harness.study.jobs import Training, digest
from harness.study.spec import Observation
from harness.training.batches import CalibrationBatches
from harness.training.curves import Curves
from harness.training.ending import Ending
from harness.training.engagement import Period
from harness.training.host_room import too_little_host_memory
from harness.training.loading import Inputs, Loaded, load
from harness.training.logs import Log
from harness.training.ranks import (
    Peaks,
    agreement,
    gathered,
    rank,
    seed_step,
    share_of,
    signal_of_any,
    total,
    weights_agree,
)
from harness.training.schedule import lr_factor
from harness.training.termination import Termination
from harness.training.verdict import verdict
from harness.training.watched_step import WatchedStep

FALLBACK_PERIODS = 4
"""Number of periods into which the run of a method without its own period is divided, to observe it."""


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
    refusal: str | None = None,
) -> TrainRecord:
    """Train once and return the record; bad outcomes are recorded, bugs raise.

    Args:
        training: model, rows, method and recipe.
        name: of the run, for the record and the progress line.
        lr: peak learning rate; None for a method that takes no step.
        lr_searched: whether it comes from a search.
        seed: of data order, initialisation of adapters, dropout and the method's own draws.
        inputs: folders of model and rows.
        folder: where logs and the exported model go; None keeps nothing (a trial of a search).
        state_folder: where resume state lives; None cannot resume.
        checkpoint_every: steps between two writes of the resume state; it is also written after the last step.
            Under several processes (`harness.training.ranks`) rank 0 alone writes it, logs and model; a state of any
            number of processes is resumed.
        observation: the observer probe; None switches it off.
        refusal: reason, known beforehand, why the run must not start; the record is then `skipped` with this reason.
    """
    torch.manual_seed(seed)
    run = _Run(training, name=name, inputs=inputs, observation=observation, refusal=refusal)
    status: Status
    status, why = outcome_of(
        lambda: run.whole(lr, seed, folder, state_folder, checkpoint_every), phase=lambda: run.current_phase
    )
    ending, checks = run.ending, [*run.checks, *run.ending.checks]
    if status == "ok" and not all(check.ok for check in checks):
        status = "disengaged"
        why = "; ".join(f"{c.name}: promised {c.promised}, saw {c.observed}" for c in checks if not c.ok)
    loaded = run.loaded
    run.meters.close()
    memory = run.meters.record(state_peak_bytes=max((p.state_bytes for p in run.periods), default=None))
    gpu, gpu_why = run.meters.gpu_record()
    void_why = run.log.judge_times(foreign_why=memory.foreign_why, alloc_retries=memory.alloc_retries)
    run.log.judge_energy(next(filter(None, [run.meters.energy_void_why, *run.energy_void_whys]), None))
    if folder is not None and rank() == 0:
        run.log.write(folder, run.periods)
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
        recipe=training.recipe.model_dump(mode="json"),
        recipe_changes=list(training.recipe_changes),
        lr=lr,
        lr_searched=lr_searched,
        steps_done=len(run.log.steps),
        checkpoint=ending.checkpoint,
        checkpoint_why=None if ending.checkpoint else (why or ending.checkpoint_why or "nothing is kept of a trial"),
        attention=loaded.attention.kind if loaded else None,
        attention_why=loaded.attention.why if loaded else None,
        parameters=loaded.facts.total_parameters if loaded else None,
        trainable_parameters=loaded.promise.trainable_parameters if loaded else None,
        train_loss=run.log.train_loss,
        validation_loss=ending.validation_loss,
        validation_why=ending.validation_why,
        clipped_share=run.log.clipped_share,
        data=loaded.data if loaded else None,
        processes=ranks(),
        rank_host_peak_bytes=[peaks.host for peaks in run.peaks],
        rank_device_allocated_peak_bytes=[peaks.device_allocated for peaks in run.peaks],
        timing=run.log.timing(
            load_s=run.load_s,
            period_steps=(loaded and loaded.promise.period_steps) or 1,
            clock=run.clock.kind,
            void_why=void_why,
        ),
        memory=memory,
        gpu=gpu,
        gpu_why=gpu_why,
        engagement=checks,
        files_sha256={}
        if folder is None or rank()
        else hashes(folder, [*folder.glob("*.jsonl"), *folder.glob("model/*")]),
        notes=[*(loaded.notes if loaded else []), *run.log.notes, *ending.notes],
        provenance=provenance(
            roots=roots_of(training.module),
            inputs=inputs.files(),
            device=run.meters.device_name,
        ),
    )


class _Run:
    """The parts of one run, in the order in which `whole` calls them."""

    def __init__(
        self, training: Training, *, name: str, inputs: Inputs, observation: Observation | None, refusal: str | None
    ) -> None:
        self.refusal = refusal
        self.training, self.recipe, self.name = training, training.recipe, name
        self.inputs, self.observation = inputs, observation
        self.meters, self.clock = Meters(self.recipe.device), StepClock(self.recipe.device)
        self.log = Log()
        self.loaded: Loaded | None = None
        self.curves: Curves | None = None
        self.load_s = 0.0
        self.ending = Ending(in_phase=self._in_phase, release=self.meters.empty_cache)
        self.checks: list[Check] = []
        self.peaks: list[Peaks] = []
        self.energy_void_whys: list[str | None] = []
        """Of every process's card, by rank."""
        self.current_phase = "load"

    def whole(
        self, lr: float | None, seed: int, folder: Path | None, state_folder: Path | None, checkpoint_every: int
    ) -> None:
        """Do the whole run.

        Raises:
            CannotRunError, DivergedError, MemoryError, RuntimeError: bad outcomes, for `outcome_of`.
        """
        if self.refusal is not None:
            raise CannotRunError(self.refusal)
        with self._in_phase("load"):
            started = time.perf_counter()
            run = load(self.training, lr=lr, seed=seed, inputs=self.inputs, observation=self.observation)
            self.loaded, self.load_s = run, time.perf_counter() - started
        run.method.calibration = CalibrationBatches(
            run.batches, autocast=self.recipe.autocast, chunked=self.recipe.chunked_loss
        )
        first_step = self._resume(run, state_folder, lr=lr, seed=seed)
        with Curves(self.name, first_step=first_step, shown=folder is not None and rank() == 0) as self.curves:
            if first_step == 0:
                if why := too_little_host_memory(run, self.recipe.device, processes=ranks(), free=free_bytes()):
                    raise CannotRunError(why)
                self._prepare(run)
            self._train(run, first_step, seed, state_folder, checkpoint_every, self.curves)
        if rank() != 0:
            return
        self.ending.validate(run)
        self.ending.export(run, folder, self.inputs)

    # ------------------------------------------------------------ before the first step

    def _resume(self, run: Loaded, state_folder: Path | None, *, lr: float | None, seed: int) -> int:
        """Restore the resume state of a killed run; returns the number of steps done."""
        if state_folder is None:
            return 0
        mine = {"learning rate": repr(lr), "seed": repr(seed), "spec": digest(self.training.model_dump(mode="json"))}
        made_from = with_code({**self.inputs.made_from, **mine}, roots_of(self.training.module))
        if rank() == 0 and (dropped := claim(state_folder, made_from)):
            self.log.notes.append(dropped)
        gathered(None)  # the others read what rank 0 has left
        found = resume.load(state_folder, run.module)
        if found is None:
            return 0
        done, rest, torn = found
        if rest:
            run.method.load_state_dict(rest["method"])
            run.watch.load_state_dict(rest["watch"])
            self.log = Log(**rest["log"])
            self.log.notes.append(f"resumed after step {done}")
        for line in torn:
            self.log.notes.append(line)
            if rank() == 0:
                say(f"{self.name}: warning: {line}")
        return done

    def _prepare(self, run: Loaded) -> None:
        """Let the method make its measurements, on calibration batches."""
        with self._in_phase("prepare"):
            self.meters.synchronise()
            self.meters.start_energy()
            started = time.perf_counter()
            # dropout in the probe must not change the random numbers of training
            with torch.random.fork_rng(devices=[torch.cuda.current_device()] if self._on_gpu else []):
                assert run.method.calibration is not None
                run.method.prepare(run.method.calibration)
            self.meters.synchronise()
            self.log.prepare_s = time.perf_counter() - started
            energy = together(gathered(self.meters.stop_energy())).over(self.log.prepare_s)
            self.log.prepare_energy_j, self.log.prepare_energy_why = energy.j, energy.why
        self._observe(run, 0)

    # ------------------------------------------------------------ steps

    def _train(
        self,
        run: Loaded,
        first_step: int,
        seed: int,
        state_folder: Path | None,
        checkpoint_every: int,
        curves: Curves,
    ) -> None:
        """Run all optimizer steps, with the observer and the engagement watch between them."""
        steps = self.recipe.steps if run.method.TRAINS else 0
        period = run.promise.period_steps or max(1, self.recipe.steps // FALLBACK_PERIODS)
        several, first = ranks() > 1, rank() == 0
        if several:
            self.log.notes.append(f"{ranks()} processes from step {first_step} on")
        with Progress(steps, self.name, done=first_step) as progress, Termination(patient=several) as termination:
            for step in range(first_step, steps):
                seed_step(seed, step)
                with self._in_phase("first_step" if step == 0 else "steady"):
                    loss = self._step(run, step, period)
                done = step + 1
                if done % period == 0 or done == steps:
                    run.watch.end_period(step)
                    self._compare(run, done)
                    self.meters.pinned(run.method.pinned_bytes())
                if self.observation and (done % self.observation.every_steps == 0 or done == steps):
                    self._observe(run, done)
                # after the last step too: what fails later is then done again without training
                asked = signal_of_any(termination.asked)
                due = done % checkpoint_every == 0 or done == steps or asked
                if state_folder is not None and due and first:
                    self._save(run, state_folder, done)
                if first:
                    curves.step(self.log.steps[-1])
                    progress.advance(f"loss {loss:.3f}", tokens=self.log.steps[-1]["tokens"])
                if asked:
                    gathered(None)  # nobody leaves before the state is whole
                    termination.leave(asked, f"{self.name}, after step {done}", tell=first)
        coarse = self.recipe.weight_dtype == "bf16"
        self.checks = verdict(run.promise, run.facts, self.periods, bf16_weights=coarse)
        self.checks += agreement(compared=self.log.compared, apart_at=self.log.apart_at)
        self.peaks = [Peaks(*peaks) for peaks in gathered(self.meters.highest())]
        self.energy_void_whys = gathered(self.meters.energy_void_why)

    def _step(self, run: Loaded, step: int, period: int) -> float:
        """Run one timed optimizer step; returns the mean loss per label token."""
        factor = lr_factor(step, self.recipe)
        context = WatchedStep(run, step, period, meters=self.meters, clock=self.clock, log=self.log)
        self.meters.start_energy()
        self.clock.start()
        facts = run_step(run, step, lr_factor=factor, context=context)
        seconds, energy, loss = self.clock.stop(), self.meters.stop_energy(), context.mean_loss()
        own = share_of(
            context.batches,
            loss=loss,
            grad_norm=facts.grad_norm,
            seconds=seconds,
            energy=energy,
            rows=run.batches.own_numbers(step),
        )
        whole = total(own, step=step, rows=run.batches.rows_of(step))
        if not whole.finite:
            raise DivergedError(f"at step {step}: loss {whole.loss}, gradient norm {whole.grad_norm}")
        self.log.step(
            step,
            loss=whole.loss,
            factor=factor,
            facts=facts,
            tokens=whole.tokens,
            total_tokens=whole.total_tokens,
            seconds=whole.seconds,
            energy=whole.energy,
            processor=self.clock.processor,
        )
        context.release_tensors()
        if context.starts_period:
            run.watch.after_update()
        return whole.loss

    def _compare(self, run: Loaded, done: int) -> None:
        """Compare the weights of all processes, if there are several."""
        if ranks() > 1:
            self.log.compared += 1
            if not weights_agree(run.module):
                self.log.apart_at.append(done)

    def _observe(self, run: Loaded, done: int) -> None:
        if self.observation is not None:  # by every process: what measures gradients averages them
            rms, loss = run.observer.observe(run.module, run.observed)
            self.meters.empty_cache()
            broken = sum(not math.isfinite(norm) for norm in rms)
            if broken or not math.isfinite(loss):
                # every loss so far was finite: it was the last update that made such weights
                raise DivergedError(
                    f"after {done} steps: validation loss {loss}, gradients of {broken} layers not finite"
                )
            row = {"step": done, "gradient_rms": rms, "batches": len(run.observed), "validation_loss": loss}
            self.log.observed.append(row)
            assert self.curves is not None
            self.curves.observed(row)

    def _save(self, run: Loaded, folder: Path, done: int) -> None:
        frozen = run.own_parameters if run.promise.base_frozen else []
        rest = {"method": run.method.state_dict(), "watch": run.watch.state_dict(), "log": vars(self.log)}
        resume.save(folder, step=done, module=run.module, frozen=frozen, rest=rest)

    # ------------------------------------------------------------ small

    @property
    def periods(self) -> list[Period]:
        """The finished periods."""
        return [p for p in self.loaded.watch.periods if p.last_step >= 0] if self.loaded else []

    @property
    def _on_gpu(self) -> bool:
        return self.recipe.device == "cuda"

    @contextmanager
    def _in_phase(self, name: str) -> Iterator[None]:
        """Attribute the block's memory peaks and errors to the phase `name`."""
        self.current_phase = name
        sign.tell(phase="steps" if name in ("first_step", "steady") else name)
        with self.meters.phase(name):
            yield
