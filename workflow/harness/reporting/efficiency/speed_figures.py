"""Throughput by method, only as measured on a GPU, and speed against peak memory, measured or else a bound."""

from __future__ import annotations

from typing import Any

from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from harness.efficiency.order import Corner
from harness.records.units import GIB
from harness.reporting.efficiency.memory_figures import corner_title, dagger, dagger_words
from harness.reporting.efficiency.memory_table import NOT_MEASURED
from harness.reporting.efficiency.rows import Row, Rows, ratio
from harness.reporting.style import Drawing, grid, legend_below, looks_of


def is_timed(rows: Rows, model: str) -> bool:
    """Whether any cell of this model, in any corner, was timed on a GPU."""
    return any(row.blocks for _, part in rows.in_corners(model) for row in part)


def throughput_bars(rows: Rows, model: str) -> Drawing:
    """One panel a corner: a bar a method at the median repeat, a dot a repeat."""
    corners = [(corner, part) for corner, part in rows.in_corners(model) if any(row.blocks for row in part)]
    figure, axes = grid(len(corners), 1, height=sum(0.27 * len(part) + 0.55 for _, part in corners) + 0.4, sharex=False)
    looks = looks_of(rows.methods)
    for panel, (corner, part) in zip(axes[:, 0], corners, strict=True):
        for place, row in enumerate(part):
            _bar(panel, place, row, looks[row.named.method].colour)
        panel.set_yticks(range(len(part)), [row.named.label for row in part])
        panel.set_ylim(len(part) - 0.4, -0.6)
        panel.margins(x=0.12)
        panel.set_xlim(left=0)
        panel.grid(visible=False, axis="y")
        panel.set_title(corner_title(corner), loc="left")
    axes[-1, 0].set_xlabel("tokens per second")
    figure.suptitle(_title(rows, model), x=0.01, ha="left", fontsize=9.5)
    return Drawing(
        name=f"throughput--{model}",
        caption=f"Tokens per second of training steps on {model}, measured on {_device(rows, model)}: bars at the "
        "median repeat, a dot a repeat, methods interleaved. "
        f"{dagger_words(row for _, part in corners for row in part)}"
        "Layers are drawn uniformly, the same for every method. "
        "Panels differ in settings, and are not to be compared with one another.",
        alt=f"Horizontal bars of tokens per second by method on {model}.",
        figure=figure,
    )


def _bar(panel: Any, place: int, row: Row, colour: str) -> None:
    if row.speed is None:
        why = "not measured" if row.measured is None else row.measured.status
        panel.text(0, place, f"  {'not timed' if why == 'ok' else why}", va="center", color="#555555", fontsize=7.5)
        return
    values = [figure.value for figure in row.speeds()]
    panel.barh(place, row.speed, height=0.62, color=colour, alpha=0.5, edgecolor=colour)
    panel.plot(values, [place] * len(values), "o", color="#222222", markersize=2.8, zorder=4)
    panel.annotate(
        f"{row.speed:,.0f}{dagger(row)}",
        (max(values), place),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=7.5,
    )


def speed_and_memory(rows: Rows, model: str) -> Drawing:
    """One panel a corner: a point a method; the line joins the methods on the Pareto front.

    If nothing was timed on a GPU, memory is forecast, and speed is the arithmetic bound relative to the reference's.
    """
    timed = is_timed(rows, model)
    corners = speeds_by_corner(rows, model)
    reference = rows.study.name(rows.study.reference)
    figure, axes = grid(1, len(corners), height=3.4)
    looks = looks_of(rows.methods)
    for panel, (corner, points) in zip(axes[0], corners, strict=True):
        front = pareto_front([(x, y) for x, y, _ in points])
        panel.plot(*zip(*front, strict=True), color="#999999", linewidth=0.9, zorder=1)
        for x, y, method in points:
            look = {"marker": looks[method].marker, "color": looks[method].colour}
            panel.plot([x], [y], **look, linestyle="none", markersize=6.5, label=method,
                       markerfacecolor=looks[method].colour if timed else "white")  # fmt: skip
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(MaxNLocator(4))
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.xaxis.set_minor_locator(NullLocator())
        panel.margins(x=0.12, y=0.12)
        panel.set_title(corner_title(corner), loc="left")
        panel.set_xlabel("peak device memory (GiB)")
    axes[0, 0].set_ylabel("tokens per second" if timed else f"bound on speed ({reference} = 1)")
    title = _title(rows, model) if timed else f"{model}: memory forecast, speed a bound by arithmetic; {NOT_MEASURED}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=9.5)
    handles = {
        label: handle for panel in axes[0] for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    shown = [row for corner, _ in corners for row in rows.known(model, corner.settings, corner.shape)]
    marks = {row.named.method: dagger(row) for row in sorted(shown, key=dagger)}
    legend_below(figure, list(handles.values()), [method + marks[method] for method in handles])
    source = (
        f"Tokens per second against peak device memory (torch's allocator) on {model}, measured on "
        f"{_device(rows, model)}."
        if timed
        else f"Speed and memory on {model}, {NOT_MEASURED}: memory is forecast, speed is what arithmetic allows if "
        f"every method runs equally efficiently, divided by {reference}'s under the same settings."
    )
    return Drawing(
        name=f"speed-and-memory--{model}",
        caption=f"{source} {dagger_words(shown)}Up and to the left is better; the grey line joins the methods that no "
        "other beats in both. "
        "Panels differ in settings, and are not to be compared with one another; their axes do not begin at 0.",
        alt=f"Scatter of {'speed' if timed else 'a bound on speed'} against peak memory by method on {model}.",
        figure=figure,
    )


def speeds_by_corner(rows: Rows, model: str) -> list[tuple[Corner, list[tuple[float, float, str]]]]:
    """The corners in which memory and speed of some method are known, with (GiB, speed, method) of each method."""
    timed = is_timed(rows, model)
    every = [(corner, _points(rows, part, timed=timed)) for corner, part in rows.in_corners(model)]
    return [(corner, points) for corner, points in every if points]


def _points(rows: Rows, part: list[Row], *, timed: bool) -> list[tuple[float, float, str]]:
    """(GiB, speed, method) of one corner: measured, or forecast with the bound on speed to the reference's."""
    points = []
    for row in part:
        peak = row.peak("measured" if timed else "forecast")
        base = rows.beside(row, rows.study.reference)
        speed = row.speed if timed else ratio(row.bound(), None if base is None else base.bound())
        if peak is not None and speed is not None:
            points.append((peak.value / GIB, speed, row.named.method))
    return points


def pareto_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto front of points (memory, speed), less memory and more speed being better; sorted by memory."""
    front: list[tuple[float, float]] = []
    for memory, speed in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or speed > front[-1][1]:
            front.append((memory, speed))
    return front


def _title(rows: Rows, model: str) -> str:
    return f"{model}: speed of a training step, measured on {_device(rows, model)}"


def _device(rows: Rows, model: str) -> str:
    names = {row.measured.device.name for row in rows if row.named.model == model and row.measured is not None}
    return ", ".join(sorted(names))
