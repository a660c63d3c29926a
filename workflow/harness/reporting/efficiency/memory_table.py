"""The table of peak memory, and the columns that all tables share.

A ratio is always to another method under the same settings.
"""

from __future__ import annotations

import re
from typing import Any, get_args

from harness.efficiency.spec import Stated
from harness.records.measured import Memory, largest
from harness.reporting.efficiency.rows import Row, Rows, Source, ratio
from harness.reporting.table import UNKNOWN, Footnotes, Table, gib_or_unknown, number, signed, table_of_rows

NOT_MEASURED = "not measured on a GPU"
OTHER_CODE = "forecast by other code than today's."
STATED = "stated by its authors, GB"


def memory_table(rows: Rows) -> Table:
    """Peak memory of every cell, forecast beside measured."""
    reference = rows.study.reference
    name, key = rows.study.name(reference), column_key(reference)
    notes = Footnotes()
    raw, display = [], []
    for row in rows.in_groups():
        if row.forecast is None and row.measured is None:
            continue
        base = rows.beside(row, reference)
        ratios = {
            source: ratio(row.peak(source), None if base is None else base.peak(source)) for source in get_args(Source)
        }
        memory = None if row.measured is None else row.measured.memory
        peak = None if memory is None else memory.allocated_peak_bytes
        said = None if row.forecast is None else row.forecast.peak_bytes
        error = None if peak is None or said is None else (said - peak) / peak
        raw.append(
            labels(row)
            | {
                "forecast_peak_bytes": said,
                f"forecast_ratio_to_{key}": ratios["forecast"],
                "forecast_stale": None if row.forecast is None else row.forecast_stale,
                "forecast_peak_phase": None if row.forecast is None else row.forecast.peak_phase,
                "forecast_host_bytes": None if row.forecast is None else row.forecast.host_bytes,
                "measured_allocated_peak_bytes": peak,
                f"measured_ratio_to_{key}": ratios["measured"],
                "measured_reserved_peak_bytes": None if memory is None else memory.reserved_peak_bytes,
                "measured_nvml_process_peak_bytes": None if memory is None else memory.nvml_process_peak_bytes,
                **{f"measured_{key}": value for key, value in host_columns(memory).items()},
                "measured_peak_phase": None if memory is None else memory.peak_phase,
                "forecast_relative_error": error,
                **({"stated_peak_gb": None, "stated_in": None} if rows.study.stated else {}),
            }
            | outcome(row)
        )
        display.append(
            shown_labels(row)
            | {
                "forecast, GiB": gib_or_unknown(said) + caveats_of_forecast(row, notes),
                f"forecast to {name}": number(ratios["forecast"], 3),
                "measured, GiB": gib_or_unknown(peak) + caveats(row, notes, missing=peak is None),
                f"measured to {name}": number(ratios["measured"], 3),
                "reserved, GiB": gib_or_unknown(None if memory is None else memory.reserved_peak_bytes),
                "NVML process, GiB": gib_or_unknown(None if memory is None else memory.nvml_process_peak_bytes)
                + (notes.mark(f"{memory.nvml_why}.") if memory is not None and memory.nvml_why else ""),
                "forecast off by": UNKNOWN if error is None else f"{signed(100 * error, 1)} %",
                "peak in": str((memory and memory.peak_phase) or (row.forecast and row.forecast.peak_phase) or UNKNOWN),
                **({STATED: UNKNOWN} if rows.study.stated else {}),
            }
        )
    for other in rows.study.stated if raw else ():
        raw.append({**dict.fromkeys(raw[0]), **_stated(other)})
        display.append({**dict.fromkeys(display[0], UNKNOWN), **_shown_stated(other, notes)})
    notes.add(
        f"Ratios are to {name} on the same model under the same settings and shape: forecast to forecast, measured to "
        "measured."
    )
    if not any(row["device"] for row in raw):
        notes.add(f"What torch's allocator and NVML count: {NOT_MEASURED}.")
    notes.add(
        "Bytes that live tensors hold (torch's allocator) under the worst draw of layers; loading the model left out."
    )
    return table_of_rows(
        "memory",
        "Peak device memory of a training step. Forecasts are computed without a GPU; measured is on a GPU.",
        raw,
        display,
        notes,
    )


# ---------------------------------------------------------------- methods of others, not run here


def _stated(row: Stated) -> dict[str, Any]:
    return {
        "model": row.model, "length": row.length, "method": row.name, "stated_peak_gb": row.peak_gb,
        "stated_in": row.source, "status_why": "not run here: stated by its authors",
    }  # fmt: skip


def _shown_stated(row: Stated, notes: Footnotes) -> dict[str, str]:
    mark = notes.mark(f"stated by its authors ({row.source}), not run here: {row.says}.")
    shape = UNKNOWN if row.length is None else f"?x{row.length}"
    return {
        "model": row.model, "shape": shape, "method": row.name + mark,
        STATED: UNKNOWN if row.peak_gb is None else number(row.peak_gb, 2),
    }  # fmt: skip


# ---------------------------------------------------------------- columns


def column_key(label: str) -> str:
    """A label as part of a raw column's name."""
    return re.sub(r"\W", "_", label)


def host_columns(memory: Memory | None) -> dict[str, int | None]:
    """Raw columns of host memory; the record holds the reason of each null."""
    pinned = ("cgroup_peak_bytes", "method_pinned_peak_bytes", "torch_pinned_peak_bytes")
    return {
        "host_peak_bytes": None if memory is None else largest(memory.host_peak_bytes),
        "host_pss_peak_bytes": None if memory is None else largest(memory.host_pss_bytes),
        **{key: getattr(memory, key, None) for key in pinned},
    }


def labels(row: Row) -> dict[str, Any]:
    """Raw columns that say which cell it is."""
    named, shape = row.named, row.entry.cell.shape
    return {
        "model": named.model, "settings": named.settings, "shape": named.shape, "batch": shape.batch,
        "length": shape.length, "method": named.method, "variant": named.variant or None,
    }  # fmt: skip


def shown_labels(row: Row) -> dict[str, str]:
    """The same for people."""
    named = row.named
    variant = f", {named.variant.replace('=', ' ').replace('_', ' ')}" if named.variant else ""
    return {"model": named.model, "settings": named.settings, "shape": named.shape, "method": named.method + variant}


def outcome(row: Row) -> dict[str, Any]:
    """Raw columns with the cell's outcome on a GPU."""
    record = row.measured
    if record is None:
        return {"status": None, "status_why": NOT_MEASURED, "device": None, "stale": None}
    return {
        "status": record.status,
        "status_why": record.status_why,
        "device": record.device.name,
        "stale": row.stale,
    }


def caveats(row: Row, notes: Footnotes, *, missing: bool) -> str:
    """Footnotes of a measured figure: why it is missing, or what limits its meaning."""
    record = row.measured
    elsewhere = notes.mark(f"measured on {', '.join(row.also_on)} too, not shown here.") if row.also_on else ""
    if record is None:
        return elsewhere or notes.mark(f"{NOT_MEASURED}.")
    mark = elsewhere + notes.mark(f"{record.status}: {record.status_why}.") if record.status != "ok" else ""
    if missing and record.status == "ok" and record.memory_why:
        mark += notes.mark(f"{record.memory_why}.")
    return mark + (notes.mark("measured by other code than today's.") if row.stale else "")


def caveats_of_forecast(row: Row, notes: Footnotes) -> str:
    """Footnotes of a forecast: why it is missing, or what limits its meaning."""
    mark = notes.mark(OTHER_CODE) if row.forecast_stale else ""
    if row.forecast is None or row.forecast.status == "ok":
        return mark
    return mark + notes.mark(f"{row.forecast.status}: {row.forecast.status_why}.")
