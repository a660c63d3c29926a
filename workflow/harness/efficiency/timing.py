"""Times steps of one cell: whole periods under random draws, after steps that are not timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from statistics import fmean, median
from typing import Any

from torch import Tensor, nn

from grass.layers import find_layers
from harness.efficiency.arithmetic import PERIOD, mean_step_s, percentile
from harness.efficiency.jobs import Job
from harness.efficiency.record import TimingBlock
from harness.efficiency.uniform_draws import uniform_policy
from harness.efficiency.utilisation import utilisation
from harness.measuring.clock import StepClock
from harness.measuring.energy import Joules
from harness.measuring.meters import Meters
from harness.step.cell import CellRun, Phase
from harness.step.draws import Policy

NO_PROBE = "the method measures nothing before its first step"
DEFAULT_PERIOD = 50
"""Steps between two draws for methods whose config entry does not set them."""


def time_steps(
    job: Job, meters: Meters, *, enter: Callable[[Phase], None], take: Callable[[CellRun], None]
) -> TimingBlock:
    """Time one repeat.

    Before the clock starts, every set of layers that will be timed trains once, so that the first allocation of a
    layer's states, which happens only early in a training run, is not timed. The warm-up steps follow.

    Args:
        job: what to time; its steps are whole periods.
        meters: of this process.
        enter: called with each phase as it begins, so that the phase is known if memory runs out.
        take: called with the run, so that the caller can release it whatever happens.
    """
    started, at = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    steps = _Steps(job, enter)
    run = steps.run
    take(run)
    meters.synchronise()
    meters.start_energy()
    before_probe = time.perf_counter()
    run.prepare()
    meters.synchronise()
    probe_s, probe_batches = time.perf_counter() - before_probe, int(_own_option(job, "probe_steps") or 0)
    probe_energy = meters.stop_energy().over(probe_s) if probe_batches else Joules(None, NO_PROBE)

    layers = list(find_layers(run.model).layers)
    reached = steps.cover(layers)
    for _ in range(job.warmup_steps // PERIOD):
        steps.period()
    history = getattr(run.method.optimizer, "history", None)
    remembered = 0 if history is None else len(history)
    clock = StepClock(job.device)
    meters.synchronise()
    meters.start_energy()
    clock.start()
    draws = [steps.period(clock) for _ in range(steps.draws)]
    step_s = tuple(clock.laps())
    energy = meters.stop_energy().over(sum(step_s))
    card, card_why = meters.card_now()
    own_period = int(_own_option(job, "sample_every") or DEFAULT_PERIOD) if steps.drawn else None
    tokens = job.cell.shape.batch * job.cell.shape.length
    tokens_per_s = tokens / mean_step_s(step_s, own_period)
    return TimingBlock(
        repeat=job.repeat,
        clock=clock.kind,
        warmup_steps=job.warmup_steps,
        timed_steps=len(step_s),
        period_steps=PERIOD,
        own_period_steps=own_period,
        step_s=step_s,
        step_median_s=median(step_s),
        step_p95_s=percentile(step_s, 0.95),
        window_s=sum(step_s),
        tokens=tokens * len(step_s),
        window_tokens_per_s=tokens * len(step_s) / sum(step_s),
        tokens_per_s=tokens_per_s,
        **utilisation(run, job.cell, tokens_per_s=tokens_per_s, card=meters.device_name),
        draws=tuple(draws) if steps.drawn else (),
        mean_reach=fmean(reached) / len(layers),
        **_copies(history, remembered),
        probe_batches=probe_batches,
        probe_s=probe_s if probe_batches else None,
        probe_s_why=None if probe_batches else NO_PROBE,
        probe_energy_j=probe_energy.j,
        probe_energy_why=probe_energy.why,
        window_energy_j=energy.j,
        energy_j_per_1000_tokens=None if energy.j is None else 1000 * energy.j / (tokens * len(step_s)),
        energy_why=energy.why,
        card_after=card,
        card_after_why=card_why,
        started_utc=at,
        wall_s=time.perf_counter() - started,
    )


def _own_option(job: Job, name: str) -> Any:
    """An option's value in the method's config entry, or its default; None if the method has no such option."""
    return getattr(job.cell.method_class().Config.model_validate(job.cell.options, strict=False), name, None)


class _Steps:
    """The steps of one repeat, in periods: first those that cover every draw, then warm-up, then the timed ones."""

    def __init__(self, job: Job, enter: Callable[[Phase], None]) -> None:
        self.draws = job.timed_steps // PERIOD
        warmup = job.warmup_steps // PERIOD
        covering = list(range(self.draws))
        self._job = job
        self._schedule = [*covering, *(place % self.draws for place in range(warmup)), *covering, 0]
        """Number of the draw used in each period."""
        self._done = 0
        self.run = CellRun(
            job.cell,
            steps=len(self._schedule) * PERIOD,
            device=job.device,
            enter=enter,
            policy=self._policy(0),
            steps_per_draw=PERIOD,
        )
        self.drawn = self.run.promise.layers == "sampled"
        if not self.drawn:
            self._schedule = self._schedule[self.draws - 1 :]

    def cover(self, layers: Sequence[nn.Module]) -> list[int]:
        """Train once under every draw; returns how many layers backward visited under each."""
        reached = []
        for _ in range(self.draws if self.drawn else 1):
            with watched_reach(layers) as visited:
                self._step()
            reached.append(len(visited))
            for _ in range(PERIOD - 1):
                if self.drawn:
                    self.run.zero_gradient_step(self._done, then=self._then())
                    self._done += 1
                else:
                    self._step()
        return reached

    def period(self, clock: StepClock | None = None) -> tuple[int, ...]:
        """Run one period; each step is a lap of the clock, if one is given. Returns the layers that trained."""
        active: tuple[int, ...] = ()
        for place in range(PERIOD):
            self._step()
            if clock is not None:
                clock.lap()
            if place == 0 and self.drawn:
                active = self.run.draws.made[-1]
        return active

    def _step(self) -> None:
        self.run.step(self._done, then=self._then())
        self._done += 1

    def _then(self) -> Policy | None:
        """In a period's last step the policy of the next period, else None."""
        period, place = divmod(self._done, PERIOD)
        return self._policy(self._schedule[period + 1]) if place == PERIOD - 1 else None

    def _policy(self, place: int) -> Policy:
        job = self._job
        return uniform_policy(place, draws=self.draws, repeat=job.repeat, repeats=job.repeats, seed=job.cell.seed)


@contextmanager
def watched_reach(layers: Sequence[nn.Module]) -> Iterator[set[int]]:
    """Yields a set that collects the numbers of the layers whose output receives a gradient inside the block."""
    visited: set[int] = set()

    def watch(number: int) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(lambda gradient: visited.add(number))

        return hook

    handles = [layer.register_forward_hook(watch(number)) for number, layer in enumerate(layers)]
    try:
        yield visited
    finally:
        for handle in handles:
            handle.remove()


def _copies(history: Any, since: int) -> dict[str, Any]:
    """Fields on copies between device and host in the timed steps, from the method's history."""
    if history is None:
        nothing = {"moved_bytes_per_step": None, "exposed_copy_s_per_step": None}
        return {**nothing, "copy_why": "the method keeps no history of copies"}
    records = history[since:]
    exposed = [record.exposed_copy_s for record in records if record.exposed_copy_s is not None]
    return {
        "moved_bytes_per_step": fmean(record.moved_bytes for record in records),
        "exposed_copy_s_per_step": fmean(exposed) if exposed else None,
        "copy_why": None if exposed else "the method could not tell how long it waited for copies",
        "offload_mode": records[-1].mode,
    }
