"""The paper's Table 4 and the claims of its Figures 4 and 5, beside our forecasts and measurements."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.efficiency.spec import PaperLabels, did_you_mean
from harness.records.units import GIB
from harness.reporting.efficiency.memory_table import NOT_MEASURED, OTHER_CODE
from harness.reporting.efficiency.rows import Row, Rows
from harness.reporting.published import Number, Published
from harness.reporting.stats import median_or_none
from harness.reporting.table import UNKNOWN, Footnotes, Table, number, signed, table_of_rows
from harness.study.strict_yaml import read_yaml


def check_published(config: Path, labels: PaperLabels, published: Published) -> None:
    """Refuse a label in the study's file that is said to be the paper's but is not in the published numbers.

    Raises:
        ConfigError: the first one, in one line.
    """
    source = read_yaml(config)
    known = {
        "models": sorted({n.model for n in published.numbers if n.model is not None}),
        "methods": sorted({n.method for n in published.numbers}),
    }
    for key, given in (("models", labels.models), ("methods", labels.methods)):
        for label in given:
            if label not in known[key]:
                what = (
                    f"the published numbers have no {key.removesuffix('s')} {label}: {did_you_mean(label, known[key])}"
                )
                raise source.error(("published", key, label), what)


def our_model(labels: PaperLabels, theirs: str | None) -> str | None:
    """Our label of one of the paper's models; None if the study has none for it."""
    return labels.unnamed if theirs is None else labels.models.get(theirs)


def published_table(rows: Rows, labels: PaperLabels, published: Published) -> Table:
    """Every published number on memory and speed of a step, and ours."""
    notes = Footnotes()
    lines = [_line(ours, published, notes) for n in published.numbers for ours in _beside(n, labels, rows)]
    for letter, text in published.sources.items():
        notes.add(f"Source {letter}: {text}.")
    notes.add(f"Residual: published less forecast. {labels.note}".rstrip())
    others = dict.fromkeys(s for stands in labels.metrics.values() for s in stands.settings if s != labels.settings)
    alone = f"; {', '.join(f'`{name}`' for name in others)} rows are ours alone" if others else ""
    notes.add(f"The paper's GB are read as GiB. Settings are inferred, the paper states none{alone}.")
    return table_of_rows(
        "published",
        f"{published.title}: published beside forecast and measured. Tolerances were stated before measuring.",
        [raw for raw, _ in lines],
        [display for _, display in lines],
        notes,
    )


def _beside(n: Number, labels: PaperLabels, rows: Rows) -> Iterator[_Ours]:
    """Every figure of ours that stands beside one published number."""
    model, stands = our_model(labels, n.model), next((s for m, s in labels.metrics.items() if m == n.metric), None)
    if model is None or stands is None:
        return
    shape = f"{stands.batch}x{(n.task or '').removeprefix('length-')}"
    for method in labels.methods.get(n.method, (n.method,)):
        for settings in stands.settings:
            yield _Ours(n, (model, settings, shape, method), rows)


class _Ours:
    """Our figures for one published number, in the published unit."""

    def __init__(self, n: Number, cell: tuple[str, str, str, str], rows: Rows) -> None:
        self.n = n
        self.model, self.settings, self.shape, self.method = cell
        self.forecast: float | None = None
        self.stale = False
        self.measured: float | None = None
        self.why: str | None = "this study has no such method"
        row = rows.get(*cell)
        if row is not None:
            (self._speed if n.metric == "throughput_ratio" else self._memory)(row, rows)

    def _speed(self, row: Row, rows: Rows) -> None:
        other = rows.beside(row, self.n.against or "")
        if other is None:
            self.why = f"this study has no method {self.n.against}"
            return
        self.measured = median_or_none(row.speed_ratios(other))
        self.why = NOT_MEASURED if self.measured is None else None

    def _memory(self, row: Row, rows: Rows) -> None:
        forecast, measured = row.peak("forecast"), row.peak("measured")
        self.forecast = None if forecast is None else forecast.value / GIB
        self.stale = row.forecast_stale
        self.measured = None if measured is None else measured.value / GIB
        self.why = None if measured is not None else _reason(row)

    @property
    def residual(self) -> float | None:
        """The published value minus the forecast; None for a bound."""
        return None if self.forecast is None or self.n.bound != "exact" else self.n.value - self.forecast

    def inside(self, value: float | None) -> bool | None:
        """Whether a value agrees with the published one, within the tolerance."""
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
