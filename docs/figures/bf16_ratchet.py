"""Draw what AdamW does to bf16 weights and moments, measured by running it: `bf16_ratchet.py <out.png>`.

Four AdamWs see the same gradients: N(0, 1) for 1,000 steps, then N(0, 0.1^2) for 4,000, rounded to bf16 for all.
Rounding to nearest is a ratchet: 0.999 v rounds back to v, and a weight stays where it is unless its update exceeds
half the distance to the next bf16 number. The numbers at the end are printed as a table.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from harness.reporting.style import grid, styled
from matplotlib.ticker import NullLocator
from torch import Tensor, nn
from torch.optim import Optimizer

from grass.adamw import AdamW

ENTRIES, WEIGHT_SIZE = 65_536, 0.02
LARGE_STEPS, SMALL_STEPS, FALL = 1_000, 4_000, 0.1
EVERY = 25  # steps from one point of a line to the next, beyond the first 25
RECIPE: dict[str, Any] = {"lr": 1e-5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}

# Okabe and Ito's colours; line and marker differ too, so that colour is never needed
LOOKS: dict[str, dict[str, Any]] = {
    "all fp32": {"color": "#000000", "linestyle": "-", "marker": "o"},
    "bf16 weights, fp32 moments": {"color": "#0072B2", "linestyle": (0, (5, 1.5)), "marker": "s"},
    "all bf16 (torch.optim.AdamW)": {"color": "#D55E00", "linestyle": (0, (1.2, 1.2)), "marker": "^"},
    "all bf16, rounded stochastically": {"color": "#009E73", "linestyle": (0, (6, 1.5, 1.2, 1.5)), "marker": "D"},
}
ALL_FP32, FP32_MOMENTS, ALL_BF16, STOCHASTIC = LOOKS


def optimizer_for(name: str, parameter: nn.Parameter) -> Optimizer:
    """The AdamW that a line of the figure is about."""
    if name == FP32_MOMENTS:
        return AdamW([parameter], state_dtype=torch.float32, **RECIPE)
    if name == STOCHASTIC:
        return AdamW([parameter], state_dtype=torch.bfloat16, stochastic_rounding=True, **RECIPE)
    return torch.optim.AdamW([parameter], **RECIPE)  # its moments have the parameter's dtype


class Line:
    """One AdamW at work: the mean of v and the share of weights that ever moved, at every recorded step."""

    def __init__(self, name: str, initial: Tensor) -> None:
        self.initial = initial.to(torch.float32 if name == ALL_FP32 else torch.bfloat16)
        self.parameter = nn.Parameter(self.initial.clone())
        self.optimizer = optimizer_for(name, self.parameter)
        self.ever_moved = torch.zeros(initial.shape, dtype=torch.bool)
        self.second: list[float] = []
        self.moved_percent: list[float] = []

    def step(self, gradient: Tensor, *, record: bool) -> None:
        """One update."""
        self.parameter.grad = gradient.to(self.parameter.dtype)
        self.optimizer.step()
        self.ever_moved |= self.parameter.detach() != self.initial
        if record:
            self.second.append(float(self.optimizer.state[self.parameter]["exp_avg_sq"].double().mean()))
            self.moved_percent.append(100 * float(self.ever_moved.double().mean()))

    def movement(self) -> Tensor:
        """From the first weights to the last."""
        return self.parameter.detach().double() - self.initial.double()


def measured() -> tuple[list[int], dict[str, Line]]:
    """The recorded steps, and all four lines after training."""
    generator = torch.Generator().manual_seed(0)
    # bf16 numbers, so that all four start from the same weights
    initial = (WEIGHT_SIZE * torch.randn(ENTRIES, generator=generator)).to(torch.bfloat16)
    lines = {name: Line(name, initial) for name in LOOKS}
    recorded = []
    for step in range(1, LARGE_STEPS + SMALL_STEPS + 1):
        size = 1.0 if step <= LARGE_STEPS else FALL
        gradient = (size * torch.randn(ENTRIES, generator=generator)).to(torch.bfloat16)
        record = step <= EVERY or step % EVERY == 0
        recorded += [step] if record else []
        for line in lines.values():
            line.step(gradient, record=record)
    return recorded, lines


def draw(steps: list[int], lines: dict[str, Line], out: Path) -> None:
    """The second moments on the left, the weights that have moved on the right, what to see in a sentence below."""
    fell = steps.index(LARGE_STEPS)
    with styled():
        figure, ((left, right),) = grid(1, 2, height=4.3)
        for i, (name, line) in enumerate(lines.items()):
            # lines that coincide are told apart by their markers, shifted against each other
            look = {**LOOKS[name], "markersize": 4.5, "markevery": (0.02 + 0.05 * i, 0.2)}
            left.plot(steps, [v / line.second[fell] for v in line.second], **look, label=name)
            right.plot(steps, line.moved_percent, **look)
        left.set(xlabel="optimizer step", ylabel="mean of second moment v (1 = when gradients fell)")
        left.set(xlim=(0, None), yscale="log", ylim=(0.02, 1.6), yticks=[0.02, 0.05, 0.1, 0.2, 0.5, 1])
        left.yaxis.set_major_formatter("{x:g}")
        left.yaxis.set_minor_locator(NullLocator())
        left.axvline(LARGE_STEPS, color="#555555", linewidth=0.8)
        left.text(LARGE_STEPS + 80, 0.022, f"gradients fall to {FALL:g} of their size", color="#555555", fontsize=8)
        right.set(xlabel="optimizer step (log scale)", ylabel="weights that have moved at least once (%)")
        right.set(xscale="log", ylim=(0, 105))
        for panel in (left, right):
            panel.xaxis.set_major_formatter("{x:,.0f}")
        figure.legend(loc="outside upper center", ncols=2, handlelength=4)
        said = {
            name: f"{line.second[-1] / line.second[fell]:.3f} and {line.moved_percent[-1]:.0f} %"
            for name, line in lines.items()
        }
        figure.supxlabel(
            f"AdamW on {ENTRIES:,} weights N(0, {WEIGHT_SIZE:g}²) at learning rate {RECIPE['lr'] * 1e5:g}e-5: share of "
            f"v left {SMALL_STEPS:,} steps after the fall, and weights ever moved,\nare {said[ALL_BF16]} in torch's "
            f"bf16 AdamW, {said[STOCHASTIC]} if rounded stochastically, {said[ALL_FP32]} in fp32.",
            fontsize=8,
        )
        figure.savefig(out, metadata={"Software": None})


def print_table(lines: dict[str, Line]) -> None:
    """The numbers at the end; the slope is 1 where rounding is unbiased, the size exceeds 1 where it is noisy."""
    v, movement = lines[ALL_FP32].second[-1], lines[ALL_FP32].movement()
    print("| relative to fp32 | v | weights ever moved | mean size of movement | slope of movement on fp32's |")
    print("|---|---|---|---|---|")
    for name, line in lines.items():
        size = float(line.movement().abs().mean() / movement.abs().mean())
        slope = float((line.movement() * movement).sum() / movement.square().sum())
        print(f"| {name} | {line.second[-1] / v:.3f} | {line.moved_percent[-1]:.2f} % | {size:.3f} | {slope:.3f} |")


if __name__ == "__main__":
    recorded, trained = measured()
    draw(recorded, trained, Path(sys.argv[1]))
    print_table(trained)
