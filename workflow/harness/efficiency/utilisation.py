"""Model FLOP utilisation: the arithmetic that a step needs, by what the card could do in its time."""

from __future__ import annotations

from typing import Any

from harness.measuring.device import ON_THE_CPU
from harness.step.cell import CellRun
from harness.step.flops import attention_width, step_cost
from harness.step.spec import Cell, Settings

PEAK_FLOP_PER_S = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
}
"""Dense bf16 products, by NVIDIA's data sheets, under the names that the driver gives."""
NEEDED = Settings(activation_checkpointing=False, chunked_loss=False)
"""Recomputation is work that the model does not ask for."""


def utilisation(run: CellRun, cell: Cell, *, tokens_per_s: float, card: str) -> dict[str, Any]:
    """The fields `mfu_*` of a timing block.

    Args:
        run: attached.
        cell: what it runs.
        tokens_per_s: of its mean step.
        card: the driver's name of it; `cpu` where there is none.
    """
    peak = PEAK_FLOP_PER_S.get(card)
    if peak is None:
        why = ON_THE_CPU if card == "cpu" else f"the peak rate of {card} is not known here"
        return {"mfu_share": None, "mfu_why": why}
    width = attention_width(run.model.config)
    cost = step_cost(run.facts, run.promise, NEEDED, cell.shape, attention_width=width)
    return {"mfu_share": cost.flop / cost.tokens * tokens_per_s / peak}
