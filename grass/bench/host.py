"""What GRASS costs on the host: its step beside torch's AdamW, its bookkeeping, its probe.

Weights, gradients and moments are fp32. Nothing here moves states: device memory is host memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import torch
from torch import nn

from grass.bench.figures import interleaved, keep_freed_memory, provenance, ratios, spread, summary
from grass.bench.stack import Stack, grass_on, loss_of
from grass.bench.stand_ins import SetsByTurns
from grass.host import current, using
from grass.sampling import Sampler

MOST_STEP_RATIO = 1.10
"""Target: a step of GRASS takes at most this many times torch's AdamW over the same parameters."""
MOST_BOOKKEEPING = 0.01
"""Target: measuring and recording importance take at most this share of a whole step."""

BASELINES: dict[str, dict[str, Any]] = {"foreach=False": {"foreach": False}, "default": {}, "fused": {"fused": True}}
"""Forms of `torch.optim.AdamW`. The target is against the first two; GRASS has the very bits of the first, which the
fused kernel rounds otherwise (its ratio is for information)."""

ROWS = 4
"""Rows of a training batch."""
PERIOD = 10
"""Steps between draws, and between refreshes, where bookkeeping is measured (the default of `Grass` is 50)."""
WARMUP = 3
"""Rounds that are not recorded."""


@dataclass(frozen=True, kw_only=True)
class HostSettings:
    """Sizes of the host part."""

    layers: int = 8
    width: int = 512
    tokens: int = 128
    """Tokens of a row. The more tokens a step has, the smaller is the share of bookkeeping."""
    step_rounds: int = 20
    """Rounds of one step each of GRASS and of its baselines."""
    periods: int = 4
    """Sampling periods of `PERIOD` steps whose bookkeeping is measured."""


def measure_host(settings: HostSettings) -> dict[str, Any]:
    """Run the host part and print what it found."""
    about = provenance(torch.device("cpu"))
    rows = measure_steps(settings, memory="as found")
    if keep_freed_memory():
        rows += measure_steps(settings, memory="kept")
    print(f"  target: at most {MOST_STEP_RATIO:.2f} of foreach=False and default")
    found = measure_bookkeeping(settings)
    return {"provenance": about, "settings": asdict(settings), "steps": rows, "bookkeeping": found}


# ------------------------------------------------------------ the step


def measure_steps(settings: HostSettings, *, memory: str) -> list[dict[str, Any]]:
    """Seconds of `opt.step()` beside torch's AdamW over the same parameters and gradients, a row a situation.

    Gradients are set beforehand and stay: no forward or backward pass is timed. No draw falls in these steps.

    Args:
        settings: of the host part.
        memory: what the C library does with freed memory, for the record (see `keep_freed_memory`).
    """
    rows = []
    for active in (settings.layers, settings.layers // 2):
        for clip in (None, 1.0):
            seconds = _step_seconds(settings, active, clip)
            mine = seconds.pop("grass")
            against = {name: ratios(mine, theirs) for name, theirs in seconds.items()}
            print(
                f"  step, {active} of {settings.layers} layers, clipping {'off' if clip is None else 'on'}, "
                f"freed memory {memory}: {1000 * summary(mine)['median']:.1f} ms; over AdamW "
                + "; ".join(f"{name} {spread(ratio)}" for name, ratio in against.items()),
                flush=True,
            )
            rows.append(
                {
                    "active_layers": active,
                    "max_grad_norm": clip,
                    "freed_memory": memory,
                    "grass_step": summary(mine, "_s"),
                    "adamw_step": {name: summary(theirs, "_s") for name, theirs in seconds.items()},
                    "grass_over_adamw": {name: summary(ratio) for name, ratio in against.items()},
                }
            )
    return rows


def _step_seconds(settings: HostSettings, active: int, clip: float | None) -> dict[str, list[float]]:
    torch.manual_seed(0)
    model = Stack(settings.layers, settings.width)
    batch = torch.randn(1, 8, settings.width)
    opt = grass_on(model, batch, active_layers=active, sample_every=1 << 30, max_grad_norm=clip)
    parameters = list(model.parameters())
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter) * 1e-3
    contenders: dict[str, Callable[[], Any]] = {"grass": opt.step}
    for name, form in BASELINES.items():
        contenders[name] = _plain_step(torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, **form), clip)
    return interleaved(contenders, warmup=WARMUP, rounds=settings.step_rounds)


def _plain_step(opt: torch.optim.Optimizer, clip: float | None) -> Callable[[], None]:
    parameters = opt.param_groups[0]["params"]

    def step() -> None:
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        opt.step()

    return step


# ------------------------------------------------------------ bookkeeping and probe

BOOKKEEPING = {
    "_measure": "gradient norms",
    "_refresh": "refresh of the probabilities",
    "_resample": "draw, and change of layers",
    "_remember": "record in the history",
}
"""What `Grass.step` does for importance; `_remember` holds `history.append`. None of them calls another."""


class _Training:
    """One `Grass` in training on a stack of its own, on draws that do not depend on what it measures."""

    def __init__(self, settings: HostSettings, sampler: Sampler) -> None:
        torch.manual_seed(0)
        self.model = Stack(settings.layers, settings.width)
        self.batch = torch.randn(ROWS, settings.tokens, settings.width)
        self.opt = grass_on(
            self.model, self.batch, sampler=sampler, active_layers=settings.layers // 2, sample_every=PERIOD
        )
        self.inside: list[dict[str, float]] = []
        """Seconds inside each method of `BOOKKEEPING`, by step."""
        # both samplers train the same layers: a low layer makes backward longer
        self.host = SetsByTurns(current(), _halves(settings.layers))
        with using(self.host):
            self.opt._resample()
        for name in BOOKKEEPING:
            setattr(self.opt, name, self._timed(name, getattr(self.opt, name)))

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            result = method(*arguments, **named)
            self.inside[-1][name] += time.perf_counter() - started
            return result

        return call

    def step(self) -> None:
        """Forward, backward, update."""
        self.inside.append(dict.fromkeys(BOOKKEEPING, 0.0))
        loss_of(self.model, self.batch).backward()
        with using(self.host):
            self.opt.step()
        self.opt.zero_grad()

    def probe_batch(self) -> None:
        """One batch of a probe of all layers."""
        self.opt._measure_all([self.batch])


def _halves(layers: int) -> Iterator[tuple[int, ...]]:
    """Half of the layers, by turns the even and the odd ones."""
    for first in cycle((0, 1)):
        yield tuple(range(first, 2 * (layers // 2), 2))


def measure_bookkeeping(settings: HostSettings) -> dict[str, Any]:
    """What importance costs in whole steps, and what a batch of a probe costs.

    Measured twice: by the clock inside the methods that do it, and as the difference to a sampler that measures
    nothing, both over the same layers. Shares and ratios are of whole periods, so that draws and refreshes count.
    """
    mine, plain = _Training(settings, "importance"), _Training(settings, "uniform")
    contenders = {"importance": mine.step, "uniform": plain.step, "probe": mine.probe_batch}
    rounds = settings.periods * PERIOD
    seconds = {name: _periods(found) for name, found in interleaved(contenders, warmup=WARMUP, rounds=rounds).items()}
    inside = {name: _periods([step[name] for step in mine.inside[WARMUP:]]) for name in BOOKKEEPING}
    shares = {name: ratios(found, seconds["importance"]) for name, found in inside.items()}
    whole = [sum(parts) for parts in zip(*shares.values(), strict=True)]
    against = ratios(seconds["importance"], seconds["uniform"])
    probe = ratios(seconds["probe"], seconds["importance"])
    tokens = ROWS * settings.tokens
    print(f"  bookkeeping, share of a step of {tokens} tokens: {spread(whole, '.3%')}; target {MOST_BOOKKEEPING:.0%}")
    for name, what in BOOKKEEPING.items():
        print(f"    {what}: {spread(shares[name], '.4%')}")
    print(f"  whole steps, importance / uniform: {spread(against, '.4f')}")
    print(f"  a batch of a probe / a step: {spread(probe)}")
    return {
        "tokens_per_step": tokens,
        "active_layers": settings.layers // 2,
        "steps_per_period": PERIOD,
        "period": {name: summary(found, "_s") for name, found in seconds.items()},
        "bookkeeping_share": summary(whole),
        "bookkeeping_share_by_method": {name: summary(found) for name, found in shares.items()},
        "importance_over_uniform": summary(against),
        "probe_batch_over_step": summary(probe),
    }


def _periods(values: Sequence[float]) -> list[float]:
    return [sum(values[start : start + PERIOD]) for start in range(0, len(values), PERIOD)]
