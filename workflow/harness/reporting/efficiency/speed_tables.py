"""Tables of timed cells. A ratio is always to another method under the same settings, repeat by repeat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import get_args

from harness.efficiency.arithmetic import PERIOD, WANTED_ERROR, pool, relative_error
from harness.efficiency.record import MFU_FORMULA
from harness.efficiency.uniform_draws import expected_reach
from harness.measuring.energy import COUNTS, OLDER
from harness.reporting.efficiency.memory_table import (
    NOT_MEASURED,
    OTHER_CODE,
    caveats,
    column_key,
    host_columns,
    labels,
    outcome,
    shown_labels,
)
from harness.reporting.efficiency.rows import Row, Rows, Source
from harness.reporting.stats import median_or_none
from harness.reporting.table import UNKNOWN, Footnotes, Table, gib_or_unknown, number, percent, table_of_rows


def throughput_table(rows: Rows) -> Table:
    """Tokens per second of every cell that was timed on a GPU."""
    notes = Footnotes()
    raw, display = [], []
    for row in rows.in_groups():
        if not row.blocks:
            continue
        ratios = {other: row.speed_ratios(rows.beside(row, other)) for other in rows.study.references}
        speeds = [figure.value for figure in row.speeds()]
        steps = pool(row.blocks)
        energy = [b.energy_j_per_1000_tokens for b in row.blocks if b.energy_j_per_1000_tokens is not None]
        energy_why = next((b.energy_why for b in row.blocks if b.energy_why), None if energy else OLDER)
        raw.append(
            labels(row)
            | {
                "tokens_per_s": row.speed,
                "tokens_per_s_min": min(speeds),
                "tokens_per_s_max": max(speeds),
                **{
                    f"ratio_to_{column_key(other)}{what}": value
                    for other, found in ratios.items()
                    for what, value in _middle_and_ends(found)
                },
                **{f"energy_j_per_1000_tokens{what}": value for what, value in _middle_and_ends(energy)},
                "energy_why": energy_why,
                "step_median_s": steps.median_s,
                "step_p95_s": steps.p95_s,
                "timed_steps": steps.count,
                "repeats": len(row.blocks),
                "mfu_share": median_or_none([b.mfu_share for b in row.blocks if b.mfu_share is not None]),
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
                "tokens/s": number(row.speed, 0) + caveats(row, notes, missing=False),
                "spread": _span(speeds, 0) + _unsure(speeds, notes),
                **{f"to {rows.study.name(other)}": _with_span(found) for other, found in ratios.items()},
                "J/1,000 tokens": _with_span(energy, 1) + (notes.mark(f"{energy_why}.") if energy_why else ""),
                "step, ms (median, p95)": f"{number(1000 * steps.median_s, 1)}, {number(1000 * steps.p95_s, 1)}",
                "MFU": percent(median_or_none([b.mfu_share for b in row.blocks if b.mfu_share is not None])),
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
        notes.add(f"{COUNTS} Of the timed steps as they were, with a draw every {PERIOD} steps.")
    notes.add(
        "Reach: share of the decoder layers that backward visited; in brackets, what uniform draws give on average if "
        "no embedding trains."
    )
    where = f" on a GPU ({_devices(rows)})" if raw else f": {NOT_MEASURED}"
    return table_of_rows("throughput", f"Tokens per second of training steps{where}.", raw, display, notes)


def _unsure(speeds: Sequence[float], notes: Footnotes) -> str:
    error = relative_error(speeds)
    if error is None or error <= WANTED_ERROR:
        return ""
    return notes.mark(f"the standard error of the mean over repeats stayed above {percent(WANTED_ERROR)}.")


def offload_table(rows: Rows) -> Table:
    """The cost of offloading the moments, compared with keeping those of active layers on the device."""
    notes = Footnotes()
    raw, display, stale = [], [], False
    for resident in rows:
        move = rows.beside(resident, resident.named.method)
        if move is None or rows.resident(move) is not resident or (not move.blocks and move.forecast is None):
            continue
        stale |= resident.forecast_stale or move.forecast_stale
        overheads = [1 - share for share in move.speed_ratios(resident)]
        steps = pool(move.blocks) if move.blocks else None
        exposed = None if steps is None else steps.exposed_s
        peaks = {source: (_value(move, source), _value(resident, source)) for source in get_args(Source)}
        raw.append(
            labels(move)
            | {
                "move_tokens_per_s": move.speed,
                "resident_tokens_per_s": resident.speed,
                **{f"overhead_share{what}": value for what, value in _middle_and_ends(overheads)},
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
                "overhead": (percent(median_or_none(overheads), 2) + span) if overheads else NOT_MEASURED,
                "exposed copies, ms a step": UNKNOWN if exposed is None else number(1000 * exposed, 2),
                "moved, GiB a step": gib_or_unknown(None if steps is None else steps.moved_bytes),
            }
            | {
                f"peak {s}, moved / resident, GiB": f"{gib_or_unknown(pair[0])} / {gib_or_unknown(pair[1])}"
                for s, pair in peaks.items()
            }
        )
    if stale:
        notes.add(f"Some figures are {OTHER_CODE} The table of peak memory marks them.")
    notes.add(
        "Overhead: tokens per second lost against the same method with the active layers' moments on the device, "
        "repeat by repeat."
    )
    return table_of_rows(
        "offload",
        "Moments moved every step against moments resident" + ("." if raw else ": nothing to show yet."),
        raw,
        display,
        notes,
    )


def rehearsal_table(rows: Rows) -> Table:
    """Cells that ran on a CPU: they prove that the program works, and say nothing about a GPU."""
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
            | {"status": record.status, "status_why": record.status_why, "cpu_tokens_per_s": median_or_none(speeds)}
            | {"repeats": len(speeds), "stale": row.rehearsal_stale, "device_memory_why": memory and memory.device_why}
            | host_columns(memory)
        )
        display.append(
            shown_labels(row)
            | {
                "status": record.status
                + (notes.mark(f"{record.status_why}.") if record.status_why else "")
                + (notes.mark("measured by other code than today's.") if row.rehearsal_stale else ""),
                "tokens/s of the CPU": number(median_or_none(speeds), 0),
                "repeats": str(len(speeds)),
                "host PSS peak, GiB": gib_or_unknown(host_columns(memory)["host_pss_peak_bytes"]),
            }
        )
    notes.add(f"Device memory, NVML's figures and MFU: {NOT_MEASURED}.")
    return table_of_rows(
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


def _middle_and_ends(values: Sequence[float]) -> Iterator[tuple[str, float | None]]:
    """Column-name suffixes with the median, the smallest and the largest value."""
    yield "", median_or_none(values)
    yield "_min", min(values, default=None)
    yield "_max", max(values, default=None)


def _span(values: list[float], digits: int) -> str:
    return UNKNOWN if len(values) < 2 else f"{number(min(values), digits)} to {number(max(values), digits)}"


def _with_span(values: list[float], digits: int = 3) -> str:
    if not values:
        return UNKNOWN
    return number(median_or_none(values), digits) + (
        f" ({number(min(values), digits)} to {number(max(values), digits)})" if values[1:] else ""
    )


def _expected(row: Row) -> float | None:
    blocks = [block for block in row.blocks if block.draws]
    layers = getattr(row.entry.cell.model, "num_hidden_layers", None)
    return expected_reach(layers, len(blocks[0].draws[0])) if blocks and layers else None


def _devices(rows: Rows) -> str:
    names = {row.measured.device.name for row in rows if row.measured is not None and row.blocks}
    return ", ".join(sorted(names))
