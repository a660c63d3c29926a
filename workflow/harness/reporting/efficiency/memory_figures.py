"""Peak memory by kind of storage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from harness.efficiency.order import Corner
from harness.records.units import GIB
from harness.reporting.efficiency.memory_table import NOT_MEASURED
from harness.reporting.efficiency.rows import Row, Rows
from harness.reporting.style import Drawing, grid, legend_below
from harness.reporting.table import gib_or_unknown

DAGGER = "†"
FORECAST_ONLY = f"forecast, {NOT_MEASURED}"
# light to dark, so that a grey print keeps the order; the hatches separate neighbours without colour
KINDS: dict[str, tuple[str, str]] = {
    "weights": ("#D9D9D9", ""),
    "gradients": ("#E69F00", "////"),
    "optimizer states": ("#0072B2", ""),
    "activations": ("#66C2A5", "...."),
    "loss": ("#CC79A7", "\\\\\\\\"),
    "other": ("#555555", ""),
}


def memory_stack(rows: Rows, model: str) -> Drawing:
    """One panel a corner: a bar a method, stacked by kind from the forecast; a diamond where it was measured."""
    corners = rows.in_corners(model)
    shown = [part for _, part in corners]
    heights = [0.27 * len(part) + 0.5 for part in shown]
    figure, axes = grid(len(corners), 1, height=sum(heights) + 0.75, sharex=True, height_ratios=heights)
    right = max((_largest(row) for part in shown for row in part), default=1.0)
    measured = any(row.peak("measured") for part in shown for row in part)
    for panel, (corner, part) in zip(axes[:, 0], corners, strict=True):
        for place, row in enumerate(part):
            _bar(panel, place, row)
        panel.set_yticks(range(len(part)), [row.named.label for row in part])
        panel.set_ylim(len(part) - 0.4, -0.6)
        panel.set_xlim(0, right * 1.16)
        panel.grid(visible=False, axis="y")
        panel.set_title(corner_title(corner), loc="left")
    axes[-1, 0].set_xlabel("peak device memory (GiB)")
    figure.suptitle(
        f"{model}: {title_of(measured, 'bars forecast, diamonds measured')}", x=0.01, ha="left", fontsize=9.5
    )
    handles: list[Any] = [
        Patch(facecolor=c, hatch=h, edgecolor="#333333", linewidth=0.4, label=k) for k, (c, h) in KINDS.items()
    ]
    if measured:
        handles.append(_diamond())
    legend_below(figure, handles, [handle.get_label() for handle in handles])
    return Drawing(
        name=f"memory--{model}",
        caption=f"Peak device memory of a training step on {model} under the worst draw of layers, by what it is made "
        "of at the peak. Bars and the numbers beside them are forecasts, computed without a GPU from the real code on "
        "tensors without values; diamonds are measured. "
        f"{measured_words(rows, model, measured)} {dagger_words(row for part in shown for row in part)}"
        "Panels differ in settings, and are not to be compared with one another.",
        alt=f"Stacked horizontal bars of peak memory by method on {model}.",
        figure=figure,
    )


def _bar(panel: Any, place: int, row: Row) -> None:
    forecast = row.forecast
    end = 0.0
    if forecast is not None and forecast.by_kind_bytes is not None:
        for kind, (colour, hatch) in KINDS.items():
            width = forecast.by_kind_bytes.get(kind, 0) / GIB
            if width > 0:
                panel.barh(
                    place, width, left=end, height=0.66, color=colour, hatch=hatch, edgecolor="#333333", linewidth=0.4,
                    label=kind,
                )  # fmt: skip
            end += width
    peak = row.peak("measured")
    refused = forecast is not None and forecast.status == "skipped"
    text = gib_or_unknown(end * GIB) if end else "refuses these settings" if refused else "no forecast"
    if peak is not None:
        at = peak.value / GIB
        panel.plot([at], [place], marker="D", color="white", markeredgecolor="black", markersize=5, zorder=5)
        text += f"  (measured {gib_or_unknown(peak.value)})"
    elif row.measured is not None and row.measured.status != "ok":
        text += f"  ({row.measured.status})"
    panel.annotate(
        text + dagger(row), (max(end, 0 if peak is None else peak.value / GIB), place), xytext=(7, 0),
        textcoords="offset points", va="center", fontsize=7.5,
    )  # fmt: skip


def _largest(row: Row) -> float:
    figures = [row.peak("forecast"), row.peak("measured")]
    return max((figure.value / GIB for figure in figures if figure is not None), default=0.0)


def _diamond() -> Line2D:
    return hollow(marker="D", markersize=5, label="measured")


def hollow(**look: Any) -> Line2D:
    """A marker without a line, for a legend."""
    return Line2D([], [], color="none", markerfacecolor="white", markeredgecolor="black", **look)


def corner_title(corner: Corner) -> str:
    """Head of a corner's panel."""
    return f"{corner.settings}, {corner.shape.replace('x', ' x ')} tokens"


def dagger(row: Row) -> str:
    """The mark of a stale figure: forecast or measured by other code than today's."""
    return DAGGER if row.forecast_stale or row.stale else ""


def dagger_words(rows: Iterable[Row]) -> str:
    """Explanation of the dagger for a caption, if any of the rows has it."""
    return f"{DAGGER}: forecast or measured by other code than today's. " if any(map(dagger, rows)) else ""


def title_of(measured: bool, legend: str) -> str:
    """What the figure shows, and whether any of it was measured."""
    return f"peak memory of a training step ({legend if measured else FORECAST_ONLY})"


def measured_words(rows: Rows, model: str, measured: bool) -> str:
    """A sentence on what was measured, for a caption."""
    names = {row.measured.device.name for row in rows if row.named.model == model and row.measured is not None}
    if not measured:
        return f"Memory: {NOT_MEASURED}."
    return f"Measured is what torch's allocator counted on {', '.join(sorted(names))}."
