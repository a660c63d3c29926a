"""What a run writes down step by step: part of its resume state, and the files beside its record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from baselines.method import LayerTrace, StepFacts
from grass.importance import effective_layers
from harness import durable
from harness.record import Timing
from harness.training.engagement import Period

WARMUP_SHARE = 0.1
"""Share of the steps left out of the throughput, at least `MIN_WARMUP`."""
MIN_WARMUP = 3
TAIL_SHARE = 0.1
"""Share of the steps, the last ones, whose mean is called the training loss."""


@dataclass
class Log:
    """Plain lists and numbers only, so that the resume state can hold it as it is."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    believed: list[dict[str, Any]] = field(default_factory=list)
    observed: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    prepare_s: float = 0.0

    def step(self, step: int, *, loss: float, factor: float, facts: StepFacts, tokens: int, seconds: float) -> None:
        """One optimizer step."""
        self.steps.append(
            {
                "step": step,
                "loss": loss,
                "lr_factor": factor,
                "grad_norm": facts.grad_norm,
                "clipped": facts.clipped,
                "tokens": tokens,
                "step_s": seconds,
            }
        )

    def belief(self, step: int, trace: LayerTrace | None) -> None:
        """What the method believes as `step` begins; kept only where something but the age changed."""
        if trace is None:
            return
        if step == 0 and trace.importance is not None and trace.probability is not None:
            self._note_if_not_adaptive(trace.probability, len(trace.active))
        row: dict[str, Any] = {"step": step, "active": list(trace.active)}
        for key in ("importance", "probability", "age_steps"):
            value = getattr(trace, key)
            row[key] = None if value is None else list(value)
        last = self.believed[-1] if self.believed else None
        if last is None or any(row[key] != last[key] for key in ("active", "importance", "probability")):
            self.believed.append(row)

    def _note_if_not_adaptive(self, probability: Sequence[float], active: int) -> None:
        """A sampler near uniform is LISA under another name; a collapsed one trains a fixed set."""
        layers, effective = len(probability), effective_layers(probability)
        if effective > 0.95 * layers:
            self.notes.append(f"not adaptive: {effective:.2f} of {layers} layers effective after probing")
        elif effective < active + 1 and layers > active:
            self.notes.append(f"collapsed: {effective:.2f} layers effective after probing, with {active} active")

    def write(self, folder: Path, periods: Sequence[Period]) -> None:
        """steps, believed, observed and periods, one JSON object a line."""
        durable.write_jsonl(folder / "steps.jsonl", self.steps)
        durable.write_jsonl(folder / "believed.jsonl", self.believed)
        durable.write_jsonl(folder / "observed.jsonl", self.observed)
        durable.write_jsonl(folder / "periods.jsonl", [vars(period) for period in periods])

    @property
    def train_loss(self) -> float | None:
        """Mean loss over the run's tail."""
        tail = self.steps[-max(1, round(TAIL_SHARE * len(self.steps))) :]
        return float(np.mean([s["loss"] for s in tail])) if tail else None

    @property
    def clipped_share(self) -> float | None:
        """Share of the steps whose gradient was clipped; None where the method does not say."""
        known = [s["clipped"] for s in self.steps if s["clipped"] is not None]
        return float(np.mean(known)) if known else None

    def timing(self, *, load_s: float, synchronised: bool) -> Timing:
        """The clock's figures; throughput is null with a reason where too few steps were made."""
        warmup = max(MIN_WARMUP, round(WARMUP_SHARE * len(self.steps))) if self.steps else 0
        timed = self.steps[warmup:]
        seconds = np.array([s["step_s"] for s in timed])
        return Timing(
            load_s=load_s,
            prepare_s=self.prepare_s,
            train_s=sum(s["step_s"] for s in self.steps),
            warmup_steps=warmup,
            step_median_s=float(np.median(seconds)) if timed else None,
            step_p95_s=float(np.quantile(seconds, 0.95)) if timed else None,
            throughput_tokens_per_s=sum(s["tokens"] for s in timed) / float(seconds.sum()) if timed else None,
            throughput_why=None if timed else "no step after the warm-up",
            device_synchronised=synchronised,
        )
