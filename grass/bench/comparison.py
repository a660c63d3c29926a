"""The device part's cells within a budget of time, and the table of their ratios."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from grass.bench.device import LEAST_SPEED, MOST_ALLOCATED_GIB, SETTINGS, VARIANTS, Cell, DeviceBench, DeviceSettings
from grass.bench.device import cells as all_cells
from grass.bench.figures import GIB, provenance, ratios, summary
from grass.bench.meters import copy_rates

COLUMNS = {
    "layers": 6,
    "moments": 7,
    "variant": 8,
    "tokens/s": 9,
    "speed / resident (least to most)": 32,
    "by step": 7,
    "step ms, p95": 15,
    "exposed ms": 10,
    "peak allocated GiB (bytes)": 26,
    "reserved GiB": 12,
}
"""Heading and width. The first ratio is of whole windows, one a round, in which a change of layers pins host memory
for those that never trained before; `by step` is the median over pairs of steps that do the same work. Peaks are of
the worst draw."""


class Budget:
    """Seconds left, and how long a cell will take by what earlier ones took."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds
        self._step_s: dict[int, float] = {}
        """By number of steps: longest mean time of a step in any such cell, building its optimizer included."""

    def fits(self, steps: int) -> bool:
        """Whether a cell of that many steps would end in time; judged by cells of another length if there was none."""
        step_s = self._step_s.get(steps, max(self._step_s.values(), default=0.0))
        return time.perf_counter() + steps * step_s <= self._end

    def took(self, steps: int, seconds: float) -> None:
        """A cell of that many steps took that long."""
        self._step_s[steps] = max(self._step_s.get(steps, 0.0), seconds / steps)


def measure_device(settings: DeviceSettings) -> dict[str, Any]:
    """Run every cell that the budget has room for, in order of importance, and print what they say."""
    budget = Budget(settings.budget_s)
    device = torch.device(settings.device)
    found: dict[str, Any] = {"provenance": provenance(device), "settings": asdict(settings)}
    print(f"  {found['provenance']['device']}, torch {torch.__version__}")
    rates = found["copy_rates"] = copy_rates(device)
    if rates is not None:
        print("  pinned copies: " + ", ".join(f"{name} {rate:.3e}" for name, rate in rates.items()), flush=True)
    try:
        bench = DeviceBench(settings)
    except torch.OutOfMemoryError as error:
        found["not_measured"] = [f"the model does not fit: {str(error).splitlines()[0]}"]
        print(f"  not measured: {found['not_measured'][0]}")
        return found
    rows: list[dict[str, Any]] = []
    left_out: list[str] = []
    for cell in all_cells(settings.rounds):
        steps = bench.steps(cell)
        if left_out or not budget.fits(steps):
            left_out.append(str(cell))
            continue
        row = bench.measure(cell)
        rows.append(row)
        if row["reason"] is None:
            budget.took(steps, row["cell_s"])
        print(f"  {cell}: {row['reason'] or _in_short(row)}", flush=True)
        for warning in row["warnings"]:
            print(f"    warning: {warning}")
    table = compare(rows)
    print_table(table)
    for name in left_out:
        print(f"  not measured, the budget of {settings.budget_s:.0f} s is used up: {name}")
    return {**found, "cells": rows, "comparison": table, "not_measured": left_out}


def _in_short(row: dict[str, Any]) -> str:
    peak = row["allocated_peak_bytes"]
    allocated = "" if peak is None else f"allocated peak {peak / GIB:.3f} GiB, "
    speed = f"{row['tokens_per_s']:,.0f} tokens/s, " if "tokens_per_s" in row else ""
    return f"{speed}{allocated}{row['cell_s']:.1f} s"


def compare(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line for every setting and variant: speeds beside `resident` round by round, peaks of the worst draws."""
    table = []
    for active, dtype in SETTINGS:
        here = [row for row in rows if (row["active_layers"], row["state_dtype"]) == (active, dtype)]
        for variant in VARIANTS:
            own = [row for row in here if row["variant"] == variant]
            if own:
                table.append(_line(Cell(active, dtype, variant, None), own, here))
    return table


def _line(cell: Cell, own: Sequence[dict[str, Any]], here: Sequence[dict[str, Any]]) -> dict[str, Any]:
    timed = {row["round"]: row for row in own if row["round"] is not None and row["reason"] is None}
    resident = {
        row["round"]: row
        for row in here
        if row["variant"] == "resident" and row["round"] in timed and row["reason"] is None
    }
    both = [number for number in timed if number in resident]
    peaks = [row for row in own if row["round"] is None and row["reason"] is None]
    exposed = [
        row["exposed_copy_s"] / row["timed_steps"] for row in timed.values() if row["exposed_copy_s"] is not None
    ]
    step_s = [seconds for row in timed.values() for seconds in row["step_s"]]
    per_step = [ratio for number in both for ratio in ratios(resident[number]["step_s"], timed[number]["step_s"])]
    per_round = [resident[number]["window_s"] / timed[number]["window_s"] for number in both]
    return {
        "active_layers": cell.active_layers,
        "state_dtype": cell.state_dtype,
        "variant": cell.variant,
        "tokens_per_s": _summary([row["tokens_per_s"] for row in timed.values()]),
        "speed_over_resident": _summary(per_round),
        "speed_over_resident_by_step": _summary(per_step),
        "step": _summary(step_s, "_s"),
        "exposed_copy_per_step": _summary(exposed, "_s"),
        "allocated_peak_bytes": peaks[0]["allocated_peak_bytes"] if peaks else None,
        "reserved_peak_bytes": peaks[0]["reserved_peak_bytes"] if peaks else None,
        "reasons": sorted({row["reason"] for row in own if row["reason"] is not None}),
    }


def _summary(values: Sequence[float], unit: str = "") -> dict[str, float] | None:
    return summary(values, unit) if values else None


def print_table(table: Sequence[dict[str, Any]]) -> None:
    """Print what `compare` found, and the targets beside it."""
    print("  " + " ".join(f"{heading:>{width}}" for heading, width in COLUMNS.items()))
    for line in table:
        print("  " + " ".join(f"{text:>{width}}" for text, width in zip(_texts(line), COLUMNS.values(), strict=True)))
        for reason in line["reasons"]:
            print(f"    {line['variant']}: {reason}")
    for line in table:
        if (line["active_layers"], line["state_dtype"], line["variant"]) == (*SETTINGS[0], "move"):
            speed, peak = line["speed_over_resident"], line["allocated_peak_bytes"]
            print(
                f"  target, {SETTINGS[0][0]} layers, {SETTINGS[0][1]} moments: move / resident at least {LEAST_SPEED} "
                f"with at most {MOST_ALLOCATED_GIB} GiB allocated (7B); this run: "
                f"{'no ratio' if speed is None else format(speed['median'], '.4f')}, "
                f"{'no peak' if peak is None else format(peak / GIB, '.3f') + ' GiB'}"
            )


def _texts(line: dict[str, Any]) -> list[str]:
    speed, ratio, step = line["tokens_per_s"], line["speed_over_resident"], line["step"]
    by_step = line["speed_over_resident_by_step"]
    exposed, peak, reserved = line["exposed_copy_per_step"], line["allocated_peak_bytes"], line["reserved_peak_bytes"]
    return [
        str(line["active_layers"]),
        line["state_dtype"],
        line["variant"],
        "-" if speed is None else f"{speed['median']:,.0f}",
        "-" if ratio is None else f"{ratio['median']:.4f} ({ratio['least']:.4f} to {ratio['most']:.4f})",
        "-" if by_step is None else f"{by_step['median']:.4f}",
        "-" if step is None else f"{1000 * step['median_s']:.1f}, {1000 * step['p95_s']:.1f}",
        "-" if exposed is None else f"{1000 * exposed['median_s']:.2f}",
        "-" if peak is None else f"{peak / GIB:.3f} ({peak:,})",
        "-" if reserved is None else f"{reserved / GIB:.3f}",
    ]
