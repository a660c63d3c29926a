"""Forecasts as text and as JSON values."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from harness.forecasting.forecast import Forecast
from harness.records.units import gib
from harness.step.spec import Cell

_FIGURES = [field.name for field in fields(Forecast) if field.name not in ("facts", "promise")]


def as_json(cell: Cell, found: Forecast | None, *, reason: str | None = None) -> dict[str, Any]:
    """The forecast with its cell; without a forecast every figure is null, and `no_forecast` gives the reason."""
    figures = {name: None if found is None else getattr(found, name) for name in _FIGURES}
    counts = {
        "parameters": None if found is None else found.facts.total_parameters,
        "trainable_parameters": None if found is None else found.promise.trainable_parameters,
    }
    return {"cell": cell.model_dump(mode="json"), "no_forecast": reason, **figures, **counts}


def as_text(title: str, found: Forecast) -> str:
    """A table of phases beside a table of what is alive at the peak."""
    draw = "" if found.worst_draw is None else f", worst draw: layers {', '.join(map(str, found.worst_draw))}"
    lines = [title, f"  peak {gib(found.peak_bytes)} GiB ({found.peak_bytes:,} bytes), in {found.peak_phase}{draw}", ""]
    left = [(name, gib(nbytes)) for name, nbytes in found.by_phase.items()]
    right = [(name, gib(nbytes)) for name, nbytes in found.by_kind.items()]
    lines.append(f"  {'peak in phase':<14}{'GiB':>8}     {'alive at the peak':<20}{'GiB':>8}")
    for (phase, first), (kind, second) in zip(left, right, strict=True):
        lines.append(f"  {phase:<14}{first:>8}     {kind:<20}{second:>8}")
    lines.append("")
    if found.by_draw:
        tried = ", ".join(f"{draw} {gib(nbytes)}" for draw, nbytes in found.by_draw.items())
        lines.append(f"  steps by draw, GiB: {tried}")
    lines.append(
        f"  optimizer states between steps, GiB: {gib(found.device_state_bytes)} on the device, "
        f"{gib(found.host_bytes)} on the host"
    )
    counts = found.facts.total_parameters, found.promise.trainable_parameters
    lines.append(f"  parameters: {counts[0]:,}, trained in a step: {counts[1]:,}")
    lines += [f"  assumed: {line}" for line in found.assumed]
    return "\n".join(lines)
