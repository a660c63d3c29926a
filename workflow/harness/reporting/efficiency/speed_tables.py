"""Tables of what was timed. A ratio is always to another method under the same settings, repeat by repeat."""

from __future__ import annotations

from statistics import median
from typing import get_args

from harness.efficiency.arithmetic import PERIOD, pool
from harness.efficiency.chance import expected_reach
from harness.efficiency.plan import RESIDENT
from harness.efficiency.record import MFU_FORMULA
from harness.reporting.efficiency.memory_table import (
    NOT_MEASURED,
    OTHER_CODE,
    REFERENCE,
    beware,
    host_columns,
    labels,
    outcome,
    shown_labels,
)
from harness.reporting.efficiency.rows import Row, Rows, Source
from harness.reporting.efficiency.sheets import gib, percent, sheet
from harness.reporting.table import UNKNOWN, Footnotes, Table, number

FULL = "full"


def throughput_table(rows: Rows) -> Table:
    """Tokens per second of every cell that was timed on a GPU."""
    notes = Footnotes()
    raw, display = [], []
    for row in rows.in_groups():
        if not row.blocks:
            continue
        to_lora = row.speed_ratios(rows.beside(row, REFERENCE))
        to_full = row.speed_ratios(rows.beside(row, FULL))
        speeds = [figure.value for figure in row.speeds()]
        steps = pool(row.blocks)
        raw.append(
            labels(row)
            | {
                "tokens_per_s": row.speed,
                "tokens_per_s_min": min(speeds),
                "tokens_per_s_max": max(speeds),
                "ratio_to_lora": _median(to_lora),
                "ratio_to_lora_min": min(to_lora, default=None),
                "ratio_to_lora_max": max(to_lora, default=None),
                "ratio_to_full": _median(to_full),
                "ratio_to_full_min": min(to_full, default=None),
                "ratio_to_full_max": max(to_full, default=None),
                "step_median_s": steps.median_s,
                "step_p95_s": steps.p95_s,
                "timed_steps": steps.count,
                "repeats": len(row.blocks),
                "mfu_share": _median([b.mfu_share for b in row.blocks if b.mfu_share is not None]),
                "mfu_why": row.blocks[0].mfu_why,
                "mean_reach_share": steps.mean_reach,
                "expected_reach_share": _expected(row),
                "moved_bytes_per_step": steps.moved_bytes,
                "exposed_copy_s_per_step": steps.exposed_s,
            }
            | outcome(row)
        )
        display.append(
            shown_labels(row)
            | {
                "tokens/s": number(row.speed, 0) + beware(row, notes, False),
                "spread": _span(speeds, 0),
                "to LoRA": _with_span(to_lora),
                "to full": _with_span(to_full),
                "step, ms (median, p95)": f"{number(1000 * steps.median_s, 1)}, {number(1000 * steps.p95_s, 1)}",
                "MFU": percent(_median([b.mfu_share for b in row.blocks if b.mfu_share is not None])),
                "reach (uniform draws)": f"{number(steps.mean_reach, 2)} ({number(_expected(row), 2)})",
                "copies exposed, ms": UNKNOWN if steps.exposed_s is None else number(1000 * steps.exposed_s, 2),
                "steps": f"{len(row.blocks)} x {row.blocks[0].timed_steps}",
            }
        )
    notes.add(
        "Median over repeats; brackets and spread: smallest to largest repeat. Ratios are taken repeat by repeat, with "
        "methods interleaved."
    )
    notes.add(
        "Layers are drawn uniformly, the same sets for every method. Figures stand for the period of the method's "
        f"entry and are computed from periods of {PERIOD} steps."
    )
    if raw:
        notes.add(f"MFU: {MFU_FORMULA}.")
    notes.add(
        "Reach: share of the decoder layers that backward visited; in brackets, what uniform draws give on average if "
        "no embedding trains."
    )
    where = f" on a GPU ({_devices(rows)})" if raw else f": {NOT_MEASURED}"
    return sheet("throughput", f"Tokens per second of training steps{where}.", raw, display, notes)


def offload_table(rows: Rows) -> Table:
    """What moving the moments costs against keeping those of active layers on the device."""
    notes = Footnotes()
    raw, display = [], []
    for resident in rows:
        if resident.named.variant != RESIDENT:
            continue
        move = rows.beside(resident, resident.named.method)
        if move is None or (not move.blocks and move.forecast is None):
            continue
        overheads = [1 - share for share in move.speed_ratios(resident)]
        steps = pool(move.blocks) if move.blocks else None
        exposed = None if steps is None else steps.exposed_s
        peaks = {source: (_value(move, source), _value(resident, source)) for source in get_args(Source)}
        raw.append(
            labels(move)
            | {
                "move_tokens_per_s": move.speed,
                "resident_tokens_per_s": resident.speed,
                "overhead_share": _median(overheads),
                "overhead_share_min": min(overheads, default=None),
                "overhead_share_max": max(overheads, default=None),
                "moved_bytes_per_step": None if steps is None else steps.moved_bytes,
                "exposed_copy_s_per_step": exposed,
            }
            | {f"move_{source}_peak_bytes": pair[0] for source, pair in peaks.items()}
            | {f"resident_{source}_peak_bytes": pair[1] for source, pair in peaks.items()}
        )
        span = "" if len(overheads) < 2 else f" ({percent(min(overheads))} to {percent(max(overheads))})"
        display.append(
            shown_labels(move)
            | {
                "overhead": (percent(_median(overheads), 2) + span) if overheads else NOT_MEASURED,
                "exposed copies, ms a step": UNKNOWN if exposed is None else number(1000 * exposed, 2),
                "moved, GiB a step": gib(None if steps is None else steps.moved_bytes),
            }
            | {f"peak {s}, moved / resident, GiB": f"{gib(pair[0])} / {gib(pair[1])}" for s, pair in peaks.items()}
        )
    if any(row.forecast_stale for row in rows if row.named.variant == RESIDENT):
        notes.add(f"Among the forecasts some are {OTHER_CODE} The table of peak memory marks them.")
    notes.add(
        "Overhead: tokens per second lost against the same method with the active layers' moments on the device, "
        "repeat by repeat."
    )
    return sheet(
        "offload",
        "Moments moved every step against moments resident" + ("." if raw else ": nothing to show yet."),
        raw,
        display,
        notes,
    )


def rehearsal_table(rows: Rows) -> Table:
    """What ran on a CPU: it proves that the program works, and is no figure of any GPU."""
    notes = Footnotes()
    raw, display = [], []
    for row in rows.in_groups():
        record = row.rehearsed
        if record is None:
            continue
        speeds = [block.tokens_per_s for block in record.timing]
        memory = record.memory
        raw.append(
            labels(row)
            | {"status": record.status, "status_why": record.status_why, "cpu_tokens_per_s": _median(speeds)}
            | {"repeats": len(speeds), "device_memory_why": memory and memory.device_why}
            | host_columns(memory)
        )
        display.append(
            shown_labels(row)
            | {
                "status": record.status + (notes.mark(f"{record.status_why}.") if record.status_why else ""),
                "tokens/s of the CPU": number(_median(speeds), 0),
                "repeats": str(len(speeds)),
                "host PSS peak, GiB": gib(host_columns(memory)["host_pss_peak_bytes"]),
            }
        )
    notes.add(f"Device memory, NVML's figures and MFU: {NOT_MEASURED}.")
    return sheet(
        "rehearsal",
        "Rehearsal on a CPU: the program runs. No figure here says anything about a GPU.",
        raw,
        display,
        notes,
    )


# ---------------------------------------------------------------- parts


def _value(row: Row, source: Source) -> float | None:
    figure = row.peak(source)
    return None if figure is None else figure.value


def _median(values: list[float]) -> float | None:
    return median(values) if values else None


def _span(values: list[float], digits: int) -> str:
    return UNKNOWN if len(values) < 2 else f"{number(min(values), digits)} to {number(max(values), digits)}"


def _with_span(values: list[float]) -> str:
    if not values:
        return UNKNOWN
    return number(median(values), 3) + (
        f" ({number(min(values), 3)} to {number(max(values), 3)})" if values[1:] else ""
    )


def _expected(row: Row) -> float | None:
    blocks = [block for block in row.blocks if block.draws]
    layers = getattr(row.entry.cell.model, "num_hidden_layers", None)
    return expected_reach(layers, len(blocks[0].draws[0])) if blocks and layers else None


def _devices(rows: Rows) -> str:
    names = {row.measured.device.name for row in rows if row.measured is not None and row.blocks}
    return ", ".join(sorted(names))
