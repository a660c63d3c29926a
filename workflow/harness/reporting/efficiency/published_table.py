"""The paper's Table 4 and the claims of its Figures 4 and 5, beside what is forecast and measured here."""

from __future__ import annotations

from statistics import median
from typing import Any

from harness.reporting.efficiency.memory_table import NOT_MEASURED, OTHER_CODE
from harness.reporting.efficiency.rows import Row, Rows
from harness.reporting.efficiency.sheets import GIB, sheet
from harness.reporting.published import Number, Published
from harness.reporting.table import UNKNOWN, Footnotes, Table, number, signed

PAPER_SETTINGS = "plain"
"""No activation checkpointing and no chunked loss, as the paper's memory table was most likely made."""
MODELS = {"tinyllama": "tinyllama-1.1b", "gemma-2b": "gemma-2b", "llama2-7b": "llama-2-7b"}
"""The paper's models under the labels of this study."""
UNNAMED = "llama-2-7b"
"""Taken where the source names no model."""
OURS = {"lisa": ("lisa", "lisa-keep")}
"""Where one of the paper's rows may be either of two of ours."""
TABLES = ("Table 4", "Figure 4", "Figure 5")


def published_table(rows: Rows, published: Published) -> Table:
    """Every published number on memory and speed of a step, and ours."""
    notes = Footnotes()
    lines = [
        _line(_Ours(n, method, settings, rows), published, notes)
        for n in published.numbers
        if n.table in TABLES and n.metric in ("peak_memory", "throughput_ratio")
        for method in OURS.get(n.method, (n.method,))
        for settings in ((PAPER_SETTINGS,) if n.metric == "peak_memory" else (PAPER_SETTINGS, "lean"))
    ]
    for letter, text in published.sources.items():
        notes.add(f"Source {letter}: {text}.")
    notes.add("Residual: published less forecast. Of each method the entry of this study, two active layers.")
    notes.add(
        "The paper's GB are read as GiB. Settings are inferred, the paper states none; `lean` rows are ours alone."
    )
    return sheet(
        "published",
        f"{published.title}: published beside forecast and measured. Tolerances were stated before measuring.",
        [raw for raw, _ in lines],
        [display for _, display in lines],
        notes,
    )


class _Ours:
    """What is known here of one published number; values in the published unit."""

    def __init__(self, n: Number, method: str, settings: str, rows: Rows) -> None:
        self.n, self.method, self.settings = n, method, settings
        self.model = UNNAMED if n.model is None else MODELS[n.model]
        # the throughput claim names a batch of 4 (source B)
        batch = 4 if n.metric == "throughput_ratio" else 1
        self.shape = f"{batch}x{(n.task or '').removeprefix('length-')}"
        self.forecast: float | None = None
        self.stale = False
        self.measured: float | None = None
        self.why: str | None = "this study has no such method"
        row = rows.get(self.model, settings, self.shape, method)
        if row is not None:
            (self._speed if n.metric == "throughput_ratio" else self._memory)(row, rows)

    def _speed(self, row: Row, rows: Rows) -> None:
        other = rows.beside(row, self.n.against or "")
        if other is None:
            self.why = f"this study has no method {self.n.against}"
            return
        ratios = row.speed_ratios(other)
        self.measured, self.why = (median(ratios), None) if ratios else (None, NOT_MEASURED)

    def _memory(self, row: Row, rows: Rows) -> None:
        forecast, measured = row.peak("forecast"), row.peak("measured")
        self.forecast = None if forecast is None else forecast.value / GIB
        self.stale = row.forecast_stale
        self.measured = None if measured is None else measured.value / GIB
        self.why = None if measured is not None else _reason(row)

    @property
    def residual(self) -> float | None:
        """The published value less the forecast; None for a bound."""
        return None if self.forecast is None or self.n.bound != "exact" else self.n.value - self.forecast

    def inside(self, value: float | None) -> bool | None:
        """Whether a value is what was published, within the tolerance."""
        if value is None:
            return None
        return value > self.n.value if self.n.bound == "above" else abs(value - self.n.value) <= self.n.tolerance

    def shown(self, value: float | None) -> str:
        """A value with this verdict."""
        return UNKNOWN if value is None else f"{number(value, 2)} ({'within' if self.inside(value) else 'outside'})"


def _line(ours: _Ours, published: Published, notes: Footnotes) -> tuple[dict[str, Any], dict[str, str]]:
    n = ours.n
    raw = {
        "table": n.table,
        "model": ours.model,
        "model_named_by_source": n.model is not None,
        "settings": ours.settings,
        "shape": ours.shape,
        "method": ours.method,
        "against": n.against,
        "metric": n.metric,
        "unit": n.unit,
        "published": n.value,
        "bound": n.bound,
        "tolerance": n.tolerance,
        "forecast": ours.forecast,
        "forecast_residual": ours.residual,
        "forecast_within": ours.inside(ours.forecast),
        "measured": ours.measured,
        "measured_within": ours.inside(ours.measured),
        "measured_why": ours.why,
        "source": n.source,
        "note": n.note or None,
    }
    unnamed = "" if n.model is not None else notes.mark("the source names no model.")
    display = {
        "table": n.table,
        "model": ours.model + unnamed,
        "settings": ours.settings,
        "shape": ours.shape,
        "method": ours.method + (f" to {n.against}" if n.against else ""),
        "published": f"{'> ' if n.bound == 'above' else ''}{number(n.value, 2)}"
        + (notes.mark(n.note) if n.note else ""),
        "tolerance": f"± {number(n.tolerance, 2)}" + notes.mark(published.tolerances[n.tolerance_why]),
        "forecast": ours.shown(ours.forecast) + (notes.mark(OTHER_CODE) if ours.stale else ""),
        "residual": signed(ours.residual, 2),
        "measured": ours.shown(ours.measured) + (notes.mark(f"{ours.why}.") if ours.why else ""),
        "source": n.source,
    }
    return raw, display


def _reason(row: Row) -> str:
    record = row.measured
    if record is None:
        return NOT_MEASURED
    return f"{record.status}: {record.status_why}" if record.status != "ok" else (record.memory_why or NOT_MEASURED)
