"""Model FLOP utilisation: the FLOP that a step needs, divided by the FLOP that the card could do in its time."""

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
"""Peak rates of dense bf16 matrix products from NVIDIA's data sheets, by the driver's name of the card."""
NEEDED = Settings(activation_checkpointing=False, chunked_loss=False)
"""Settings without recomputation, which is not part of the FLOP that the model needs."""


def utilisation(run: CellRun, cell: Cell, *, tokens_per_s: float, card: str) -> dict[str, Any]:
    """The fields `mfu_*` of a timing block.

    Args:
        run: a run with its method attached.
        cell: the cell of the run.
        tokens_per_s: throughput of its mean step.
        card: the driver's name of the card; `cpu` if there is none.
    """
    peak = PEAK_FLOP_PER_S.get(card)
    if peak is None:
        why = ON_THE_CPU if card == "cpu" else f"the peak rate of {card} is not known here"
        return {"mfu_share": None, "mfu_why": why}
    width = attention_width(run.model.config)
    cost = step_cost(run.facts, run.promise, NEEDED, cell.shape, attention_width=width)
    return {"mfu_share": cost.flop / cost.tokens * tokens_per_s / peak}
