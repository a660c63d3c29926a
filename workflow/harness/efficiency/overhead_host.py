"""What GRASS costs on the host: its step beside torch's AdamW, its bookkeeping, a batch of its probe.

Weights, gradients and moments are fp32. Nothing here moves states: device memory is host memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from grass.host import current
from grass.sampling import Sampler
from harness.efficiency.arithmetic import PERIOD
from harness.efficiency.by_turns import Spread, interleaved, ratios, timed_calls
from harness.measuring.freed_memory import keep_freed_memory
from harness.records.device import StrictRecord
from harness.step.cell import CellRun
from harness.step.draws import ForcedDraws, Policy, bottom_and_top
from harness.step.spec import Cell, Geometry, Numerics, Settings, Shape

MOST_STEP_RATIO = 1.10
"""Target: a step of GRASS takes at most this many times torch's AdamW over the same parameters."""
MOST_BOOKKEEPING = 0.01
"""Target: measuring and recording importance take at most this share of a whole step."""

ADAMW: dict[str, dict[str, Any]] = {"foreach=False": {"foreach": False}, "default": {}, "fused": {"fused": True}}
"""Forms of `torch.optim.AdamW`. GRASS has the very bits of the fused one, which rounds otherwise than the others."""

GEOMETRY = Geometry(
    architecture="llama",
    hidden_size=512,
    intermediate_size=1376,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=256,
    tie_word_embeddings=False,
    parameters=25_567_744,
)
"""Large enough for the arithmetic of a layer to outweigh the calls that begin it, and still a minute of one core."""
SHAPE = Shape(batch=2, length=128)
"""Of the whole steps. The more tokens a step has, the smaller is the share of bookkeeping."""
WARMUP = 2
"""Rounds that are not recorded."""
NEVER = 1 << 30
"""Steps between two draws where none shall fall in what is timed."""

BOOKKEEPING = {
    "_measure": "gradient norms",
    "_refresh": "refresh of the probabilities",
    "_resample": "draw, and change of layers",
    "_remember": "record in the history",
}
"""Methods with which `Grass.step` works for importance; none of them calls another."""


class StepCost(StrictRecord):
    """`opt.step()` of GRASS and of AdamW over the same parameters and gradients."""

    active_layers: int
    max_grad_norm: float | None
    freed_memory: Literal["as found", "kept"]
    grass_step_s: Spread
    adamw_step_s: dict[str, Spread]
    grass_over_adamw_ratio: dict[str, Spread]


class Bookkeeping(StrictRecord):
    """What importance costs in whole steps, and what a batch of a probe costs."""

    active_layers: int
    period_steps: int
    period_s: dict[str, Spread]
    bookkeeping_share: Spread
    method_share: dict[str, Spread]
    importance_over_uniform_ratio: Spread
    probe_batch_over_step_ratio: Spread


class HostPart(StrictRecord):
    """All that is measured on the host."""

    geometry: Geometry
    shape: Shape
    load_average_1min: float
    steps: tuple[StepCost, ...]
    bookkeeping: Bookkeeping


def measure_host(rounds: int) -> HostPart:
    """Measure on this machine's processor, and print each figure as it is known.

    From its middle on the C library keeps what is freed in this process, where it can be told to.

    Args:
        rounds: whole periods of `PERIOD`; each has one step of every contender.
    """
    print("host: what GRASS costs beside torch's AdamW; median (quartiles) of neighbouring rounds", flush=True)
    load = os.getloadavg()[0]
    steps = step_costs(rounds, "as found")
    if keep_freed_memory():
        steps += step_costs(rounds, "kept")
    print(f"  target: at most {MOST_STEP_RATIO:.2f} of each", flush=True)
    return HostPart(
        geometry=GEOMETRY,
        shape=SHAPE,
        load_average_1min=load,
        steps=tuple(steps),
        bookkeeping=bookkeeping(rounds),
    )


def _run(
    *,
    active: int,
    shape: Shape,
    sampler: Sampler = "importance",
    clip: float | None = None,
    policy: Policy = bottom_and_top,
    steps_per_draw: int = PERIOD,
) -> CellRun:
    """GRASS on the decoder layers of the host's model, every one of which is measured in one batch of the probe."""
    options = {"active_layers": active, "sampler": sampler, "probe_steps": 1, "offload": "resident"}
    outside = dict.fromkeys(("train_embedding", "train_head", "train_final_norm"), False)
    cell = Cell(
        model=GEOMETRY,
        module="grass",
        options={**options, **outside},
        settings=Settings(activation_checkpointing=False, chunked_loss=False),
        shape=shape,
        numerics=Numerics(weight_dtype="fp32", state_dtype="fp32", max_grad_norm=clip),
    )
    return CellRun(
        cell, steps=NEVER, device="cpu", enter=lambda phase: None, policy=policy, steps_per_draw=steps_per_draw
    )


# ------------------------------------------------------------ the step


def step_costs(rounds: int, freed_memory: Literal["as found", "kept"]) -> list[StepCost]:
    """Seconds of `opt.step()` beside torch's AdamW, a row a situation.

    Gradients are set beforehand and stay: no forward or backward pass is timed. No draw falls in these steps.

    Args:
        rounds: steps of every contender.
        freed_memory: what the C library does with it, for the record (see `keep_freed_memory`).
    """
    rows = []
    layers = GEOMETRY.num_hidden_layers
    for active in (layers, layers // 2):
        for clip in (None, 1.0):
            seconds = _step_seconds(rounds, active, clip)
            mine = seconds.pop("grass")
            row = StepCost(
                active_layers=active,
                max_grad_norm=clip,
                freed_memory=freed_memory,
                grass_step_s=Spread.of(mine),
                adamw_step_s={name: Spread.of(theirs) for name, theirs in seconds.items()},
                grass_over_adamw_ratio={name: Spread.of(ratios(mine, theirs)) for name, theirs in seconds.items()},
            )
            rows.append(row)
            print(
                f"  step, {active} of {layers} layers, clipping {'off' if clip is None else 'on'}, freed memory "
                f"{freed_memory}: {1000 * row.grass_step_s.median:.1f} ms; over AdamW "
                + "; ".join(f"{name} {ratio.text()}" for name, ratio in row.grass_over_adamw_ratio.items()),
                flush=True,
            )
    return rows


def _step_seconds(rounds: int, active: int, clip: float | None) -> dict[str, list[float]]:
    run = _run(active=active, shape=Shape(batch=1, length=8), clip=clip, steps_per_draw=NEVER)
    run.prepare()
    parameters = list(run.model.parameters())
    for parameter in parameters:
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter) * 1e-3
    contenders: dict[str, Callable[[], object]] = {"grass": _optimizer(run).step}
    for name, form in ADAMW.items():
        contenders[name] = _plain_step(torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, **form), clip)
    return interleaved(contenders, warmup=WARMUP, rounds=rounds)


def _plain_step(opt: torch.optim.Optimizer, clip: float | None) -> Callable[[], None]:
    parameters = opt.param_groups[0]["params"]

    def step() -> None:
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        opt.step()

    return step


def _optimizer(run: CellRun) -> torch.optim.Optimizer:
    opt = run.method.optimizer
    assert opt is not None
    return opt


# ------------------------------------------------------------ bookkeeping and probe


def _half(number: int) -> Policy:
    """Half of the layers: the even or the odd ones, by turns."""
    return lambda layers, count: tuple(range(number % 2, 2 * (layers // 2), 2))[:count]


class _AlsoByChance(ForcedDraws):
    """Layers are drawn as ever, since a draw costs time too, but those of the policy train."""

    def draw(self, layers: int, count: int, by_chance: Callable[[], tuple[int, ...]]) -> tuple[int, ...]:
        """The policy's answer."""
        by_chance()
        return super().draw(layers, count, by_chance)


class Training:
    """One GRASS in training on a model of its own, on draws that do not depend on what it measures."""

    def __init__(self, sampler: Sampler) -> None:
        # all samplers train the same layers: a low layer makes backward longer
        self.run = _run(active=GEOMETRY.num_hidden_layers // 2, shape=SHAPE, sampler=sampler, policy=_half(0))
        self.run.draws = _AlsoByChance(current(), policy=_half(0))
        self.run.prepare()
        self.inside: list[dict[str, float]] = []
        """Seconds inside each method of `BOOKKEEPING`, by step."""

    def step(self) -> None:
        """Forward, backward, update."""
        number = len(self.inside)
        with timed_calls(_optimizer(self.run), list(BOOKKEEPING)) as seconds:
            self.run.step(number, then=_half(1 + number // PERIOD))
        self.inside.append(seconds)


def bookkeeping(rounds: int) -> Bookkeeping:
    """Measure twice: by the clock inside the methods that do it, and beside a sampler that measures nothing.

    Both train the same layers. Shares and ratios are of whole periods, so that draws and refreshes count.

    Args:
        rounds: whole periods of `PERIOD` steps.
    """
    mine, plain, probed = Training("importance"), Training("uniform"), Training("importance")
    contenders = {"importance": mine.step, "uniform": plain.step, "probe": probed.run.prepare}
    seconds = {name: _periods(found) for name, found in interleaved(contenders, warmup=WARMUP, rounds=rounds).items()}
    inside = {name: _periods([step[name] for step in mine.inside[WARMUP:]]) for name in BOOKKEEPING}
    shares = {name: ratios(found, seconds["importance"]) for name, found in inside.items()}
    found = Bookkeeping(
        active_layers=GEOMETRY.num_hidden_layers // 2,
        period_steps=PERIOD,
        period_s={name: Spread.of(taken) for name, taken in seconds.items()},
        bookkeeping_share=Spread.of([sum(parts) for parts in zip(*shares.values(), strict=True)]),
        method_share={name: Spread.of(share) for name, share in shares.items()},
        importance_over_uniform_ratio=Spread.of(ratios(seconds["importance"], seconds["uniform"])),
        probe_batch_over_step_ratio=Spread.of(ratios(seconds["probe"], seconds["importance"])),
    )
    print(
        f"  bookkeeping, share of a step of {SHAPE.batch * SHAPE.length} tokens: "
        f"{found.bookkeeping_share.text('.3%')}; target {MOST_BOOKKEEPING:.0%}"
    )
    for name, what in BOOKKEEPING.items():
        print(f"    {what}: {found.method_share[name].text('.4%')}")
    print(f"  whole steps, importance / uniform: {found.importance_over_uniform_ratio.text('.4f')}")
    print(f"  a batch of a probe / a step: {found.probe_batch_over_step_ratio.text()}", flush=True)
    return found


def _periods(values: Sequence[float]) -> list[float]:
    return [sum(values[start : start + PERIOD]) for start in range(0, len(values), PERIOD)]
