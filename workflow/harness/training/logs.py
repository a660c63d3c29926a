"""The log of a run, step by step: part of its resume state, and the files beside its record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from baselines.method import LayerTrace, StepFacts
from grass.importance import effective_layers
from harness.measuring.energy import Joules, together
from harness.measuring.processors import ProcessorTime, crowded_why
from harness.records import atomic
from harness.records.measured import Timing
from harness.training.engagement import Period

WARMUP_SHARE = 0.1
"""Share of the steps, the first ones, left out of the throughput; at least `MIN_WARMUP` steps."""
MIN_WARMUP = 3
TAIL_SHARE = 0.1
"""Share of the steps, the last ones, whose mean loss is reported as the training loss."""


@dataclass
class Log:
    """Plain lists and numbers only, so that the resume state can hold it as it is."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    believed: list[dict[str, Any]] = field(default_factory=list)
    observed: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    prepare_s: float = 0.0
    prepare_energy_j: float | None = None
    prepare_energy_why: str | None = "the run ended before"
    energy_why: str | None = None
    """Why a step has no energy: the first reason."""
    compared: int = 0
    """How often the weights of all processes were compared."""
    apart_at: list[int] = field(default_factory=list)
    """Steps after which they differed."""

    def step(
        self,
        step: int,
        *,
        loss: float,
        factor: float,
        facts: StepFacts,
        tokens: int,
        total_tokens: int,
        seconds: float,
        energy: Joules,
        processor: ProcessorTime | None = None,
    ) -> None:
        """One optimizer step.

        Args:
            step: counted from 0.
            loss: mean per label token.
            factor: of the schedule.
            facts: of the method.
            tokens: without padding, of all processes.
            total_tokens: the same with padding.
            seconds: of the slowest process.
            energy: of the cards of all processes.
            processor: this process's processor time; None on a GPU.
        """
        self.energy_why = self.energy_why or energy.why
        self.steps.append(
            {
                "step": step,
                "loss": loss,
                "lr_factor": factor,
                "grad_norm": facts.grad_norm,
                "clipped": facts.clipped,
                "tokens": tokens,
                "total_tokens": total_tokens,
                "step_s": seconds,
                "energy_j": energy.j,
                "processor_s": None if processor is None else processor.ran_s,
                "waited_s": None if processor is None else processor.waited_s,
            }
        )

    def belief(self, step: int, trace: LayerTrace | None) -> None:
        """Log what the method believes as `step` begins, if anything but the age has changed."""
        if trace is None:
            return
        if step == 0 and trace.importance is not None and trace.probability is not None:
            self._note_if_not_adaptive(trace.probability, len(trace.active))
        row: dict[str, Any] = {"step": step, "active": list(trace.active)}
        for key in ("importance", "probability", "age_steps"):
            value = getattr(trace, key)
            row[key] = None if value is None else list(value)
        row["temperature"] = trace.temperature
        row["effective_layers"] = None if trace.probability is None else effective_layers(trace.probability)
        last = self.believed[-1] if self.believed else None
        if last is None or any(row[key] != last[key] for key in ("active", "importance", "probability")):
            self.believed.append(row)

    def _note_if_not_adaptive(self, probability: Sequence[float], active: int) -> None:
        """Note a sampler that is near uniform, and so acts like LISA, or collapsed, and so trains a fixed set."""
        layers, effective = len(probability), effective_layers(probability)
        if effective > 0.95 * layers:
            self.notes.append(f"not adaptive: {effective:.2f} of {layers} layers effective after probing")
        elif effective < active + 1 and layers > active:
            self.notes.append(f"collapsed: {effective:.2f} layers effective after probing, with {active} active")

    def write(self, folder: Path, periods: Sequence[Period]) -> None:
        """Write steps, believed, observed and periods, one JSON object a line."""
        atomic.write_jsonl(folder / "steps.jsonl", self.steps)
        atomic.write_jsonl(folder / "believed.jsonl", self.believed)
        atomic.write_jsonl(folder / "observed.jsonl", self.observed)
        atomic.write_jsonl(folder / "periods.jsonl", [vars(period) for period in periods])

    @property
    def train_loss(self) -> float | None:
        """Mean loss over the run's tail."""
        tail = self.steps[-max(1, round(TAIL_SHARE * len(self.steps))) :]
        return float(np.mean([s["loss"] for s in tail])) if tail else None

    @property
    def clipped_share(self) -> float | None:
        """Share of the steps whose gradient was clipped; None if the method does not report it."""
        known = [s["clipped"] for s in self.steps if s["clipped"] is not None]
        return float(np.mean(known)) if known else None

    def judge_times(self, *, foreign_why: str | None, alloc_retries: int | None) -> str | None:
        """Void the step times if other work slowed them, and note slowed ones. Call it before `write`.

        Args:
            foreign_why: which other process was on the GPU; None if there was none.
            alloc_retries: how often the allocator emptied its cache, which waits for the device.

        Returns:
            Why all times are void; None if they count.
        """
        crowded = self._crowded_why()
        if alloc_retries:
            self.notes.append(
                f"the allocator ran out of memory and emptied its cache {alloc_retries} times, on the steps' clock"
            )
        if foreign_why is not None:
            self.notes.append(f"memory and speed are void: {foreign_why}")
        elif crowded is not None:
            self.notes.append(f"speed is void: {crowded}")
        why = foreign_why or crowded
        if why is not None:
            for row in self.steps:
                row["step_s"] = None
        return why

    def judge_energy(self, void_why: str | None) -> None:
        """Void all energy if a card was not the run's alone, as `void_why` says. Call it before `write`."""
        if void_why is not None:
            self.prepare_energy_j, self.prepare_energy_why = None, void_why
            self.energy_why = void_why
            for row in self.steps:
                row["energy_j"] = None

    def _energy(self, steps: Sequence[dict[str, Any]], *, void_why: str | None) -> Joules:
        """Of these steps together; unknown, too, where their times are void."""
        if not steps:
            return Joules(None, "no step was made")
        # a run resumed from an old resume state has no energy for its first steps
        why = self.energy_why or "steps of an older resume state have no energy"
        known = [Joules(row["energy_j"]) if row.get("energy_j") is not None else Joules(None, why) for row in steps]
        if void_why is not None:
            known.append(Joules(None, f"void: {void_why}"))
        found = together(known)
        return found if found.j is None else found.over(sum(row["step_s"] for row in steps))

    def _crowded_why(self) -> str | None:
        """Which part of their time the steps waited for a processor, if it was too much; None on a GPU."""
        # a run resumed from an old resume state has no processor time for its first steps
        rows = [row for row in self.steps if row.get("processor_s") is not None]
        waited = [row["waited_s"] for row in rows]
        return crowded_why(
            ran_s=sum(row["processor_s"] for row in rows),
            waited_s=None if None in waited else sum(waited),
            wall_s=sum(row["step_s"] for row in rows),
        )

    def _total(self, key: str) -> float | None:
        """Sum over the steps; None where a step has no such number."""
        values = [row.get(key) for row in self.steps]
        return None if not values or None in values else float(sum(values))  # type: ignore[arg-type]

    def timing(
        self,
        *,
        load_s: float,
        period_steps: int,
        clock: Literal["perf_counter", "cuda events"],
        void_why: str | None = None,
    ) -> Timing:
        """The clock's figures; throughput is null, with a reason, if too few steps were made.

        Args:
            load_s: seconds to load model and rows.
            period_steps: only whole periods of this many steps are timed, so that draws have their proper weight.
            clock: the clock that timed the steps.
            void_why: as `judge_times` says; if given, every step time is null.
        """
        steps = len(self.steps)
        warmup = max(MIN_WARMUP, round(WARMUP_SHARE * steps)) if steps else 0
        first = -(-warmup // period_steps) * period_steps
        timed = self.steps[first : steps // period_steps * period_steps]
        why = None if void_why is None else f"void: {void_why}"
        if why is None and not timed:
            what = f"no whole period of {period_steps} steps" if period_steps > 1 else "no step"
            why = f"{what} after the warm-up"
        seconds = np.array([s["step_s"] for s in timed] if why is None else [])

        def per_second(key: str) -> float | None:
            # a run resumed from an old resume state has no padding counts for its first steps
            if why is not None or not all(key in s for s in timed):
                return None
            return float(sum(s[key] for s in timed) / seconds.sum())

        whole = self._energy(self.steps, void_why=void_why)
        of_timed = self._energy(timed, void_why=void_why) if timed else Joules(None, why)
        tokens = sum(s["tokens"] for s in timed)
        return Timing(
            load_s=load_s,
            prepare_s=self.prepare_s if void_why is None else None,
            train_s=sum(s["step_s"] for s in self.steps) if void_why is None else None,
            processor_s=self._total("processor_s"),
            waited_s=self._total("waited_s"),
            warmup_steps=min(first, steps),
            timed_steps=len(timed),
            step_median_s=float(np.median(seconds)) if why is None else None,
            step_p95_s=float(np.quantile(seconds, 0.95)) if why is None else None,
            throughput_tokens_per_s=per_second("tokens"),
            throughput_total_tokens_per_s=per_second("total_tokens"),
            throughput_why=why,
            clock=clock,
            device_synchronised=clock == "cuda events",
            prepare_energy_j=self.prepare_energy_j,
            prepare_energy_why=self.prepare_energy_why,
            train_energy_j=whole.j,
            energy_j_per_1000_tokens=None if of_timed.j is None else 1000 * of_timed.j / tokens,
            energy_why=whole.why or of_timed.why,
        )
