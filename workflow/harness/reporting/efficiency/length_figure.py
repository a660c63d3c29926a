"""Peak memory against the length of a row, with the paper's points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.lines import Line2D

from harness.efficiency.spec import PaperLabels
from harness.records.units import GIB
from harness.reporting.efficiency.memory_figures import dagger, dagger_words, hollow, measured_words, title_of
from harness.reporting.efficiency.published_table import our_model
from harness.reporting.efficiency.rows import Row, Rows, Source
from harness.reporting.published import Published
from harness.reporting.style import Drawing, grid, legend_below, looks_of


def memory_by_length(rows: Rows, model: str, published: Published) -> Drawing:
    """One panel a setting: a line a method, and the paper's points if the settings are the paper's."""
    every = [r for r in rows if r.named.model == model and r.entry.cell.shape.batch == 1 and not r.named.variant]
    settings = list(dict.fromkeys(row.named.settings for row in every))
    figure, axes = grid(1, len(settings), height=3.9, sharey=True)
    lengths = {method: _lengths(every, method) for method in rows.methods}
    # a method with a figure at only one length makes no line; the figure of all methods shows it
    chosen = [method for method, known in lengths.items() if known > 1] or list(lengths)
    looks = {method: look for method, look in looks_of(rows.methods).items() if method in chosen}
    measured = any(row.peak("measured") for row in every)
    card = rows.study.card_gib
    by_method = {method: [r for r in every if r.named.method == method] for method in looks}
    shown, beyond = _parted(by_method, card)
    stars = _points(rows.study.published, published, model)
    for panel, setting in zip(axes[0], settings, strict=True):
        mine = [row for row in every if row.named.settings == setting]
        for method in shown:
            _line(panel, [row for row in mine if row.named.method == method], looks[method])
        if rows.study.published is not None and setting == rows.study.published.settings:
            _published_points(panel, stars, {method: looks[method] for method in shown})
        for place, method in enumerate(beyond):
            span = _span([row for row in mine if row.named.method == method])
            if span:
                panel.annotate(f"{method}: {span} GiB, beyond the axis", (0.03, 0.98), xycoords="axes fraction",
                               xytext=(0, -10 * place), textcoords="offset points", va="top", fontsize=7.5,
                               color=looks[method].colour)  # fmt: skip
        panel.axhline(card, color="#777777", linestyle=(0, (4, 3)), linewidth=0.9, zorder=1)
        panel.annotate(f"{card:g} GB card", (1.0, card), xycoords=("axes fraction", "data"), xytext=(0, 2),
                       textcoords="offset points", ha="right", va="bottom", fontsize=7, color="#555555")  # fmt: skip
        panel.set_title(setting, loc="left")
        panel.set_xlabel("tokens in the row (batch of one)")
        ticks = sorted({row.entry.cell.shape.length for row in mine})
        panel.set_xticks(ticks, [str(tick) for tick in ticks], rotation=60)
        panel.set_xlim(0, 1.04 * ticks[-1])
    low, high = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(low, high + 0.07 * len(beyond) * (high - low))
    axes[0, 0].set_ylabel("peak device memory (GiB)")
    figure.suptitle(
        f"{model}: {title_of(measured, 'lines forecast, filled markers measured')}", x=0.01, ha="left", fontsize=9.5
    )
    marks = {row.named.method: dagger(row) for row in sorted(every, key=dagger)}
    handles = [
        Line2D(
            [],
            [],
            color=look.colour,
            marker=look.marker,
            linestyle=look.line,
            markerfacecolor="white",
            label=name + marks[name],
        )
        for name, look in looks.items()
        if name in shown
    ]
    if stars:
        handles.append(hollow(marker="*", markersize=9, label="published"))
    legend_below(figure, handles, [str(handle.get_label()) for handle in handles])
    return Drawing(
        name=f"memory-by-length--{model}",
        caption=f"Peak device memory against the length of a row on {model}. Lines with hollow markers are forecasts, "
        f"filled markers are measured. {measured_words(rows, model, measured)} Stars: published values, in the colour "
        f"of their method, with an arrow where only a bound is published (above {card:g}); GB read as GiB, settings "
        f"and model inferred. {dagger_words(every)}The axis does not begin at 0; methods beyond it are named at the "
        "top.",
        alt=f"Lines of peak memory against sequence length by method on {model}.",
        figure=figure,
    )


def _parted(by_method: dict[str, list[Row]], card_gib: float) -> tuple[list[str], list[str]]:
    """Methods that fit on a consumer card at some length, and those whose scale would compress all other lines."""
    least = {method: min(found, default=0.0) for method, rows in by_method.items() if (found := _peaks(rows))}
    fitting = [method for method, value in least.items() if value <= card_gib]
    return (fitting, [method for method in least if method not in fitting]) if fitting else (list(least), [])


def _lengths(rows: Sequence[Row], method: str) -> int:
    known = (row for row in rows if row.named.method == method and (row.peak("forecast") or row.peak("measured")))
    return len({row.entry.cell.shape.length for row in known})


def _peaks(rows: Sequence[Row]) -> list[float]:
    figures = [row.peak(source) for row in rows for source in ("forecast", "measured")]
    return [figure.value / GIB for figure in figures if figure is not None]


def _span(rows: Sequence[Row]) -> str:
    peaks = [round(peak) for peak in _peaks(rows)]
    if not peaks:
        return ""
    return f"{min(peaks)}" if min(peaks) == max(peaks) else f"{min(peaks)} to {max(peaks)}"


def _line(panel: Any, rows: Sequence[Row], look: Any) -> None:
    def points(source: Source) -> list[tuple[int, float]]:
        found = [(row.entry.cell.shape.length, row.peak(source)) for row in rows]
        return sorted((length, figure.value / GIB) for length, figure in found if figure is not None)

    style = {"marker": look.marker, "color": look.colour}
    if said := points("forecast"):
        panel.plot(*zip(*said, strict=True), linestyle=look.line, markerfacecolor="white", markersize=4.5, **style)
    if seen := points("measured"):
        panel.plot(*zip(*seen, strict=True), linestyle="none", markersize=5, **style)


def _points(labels: PaperLabels | None, published: Published, model: str) -> list[tuple[str, int, float, bool]]:
    """(method, length, GiB, whether only a bound) of the paper's memory figures for this model."""
    if labels is None:
        return []
    return [
        (n.method, int((n.task or "").removeprefix("length-")), n.value, n.bound == "above")
        for n in published.numbers
        if n.metric == "peak_memory" and our_model(labels, n.model) == model
    ]


def _published_points(panel: Any, points: list[tuple[str, int, float, bool]], looks: dict[str, Any]) -> None:
    for method, length, value, bound in points:
        if method not in looks:
            continue
        colour = looks[method].colour
        panel.plot([length], [value], marker="*", markersize=9, color="white", markeredgecolor=colour,
                   markeredgewidth=1.2, linestyle="none", zorder=6)  # fmt: skip
        if bound:
            panel.annotate("", (length, value), xytext=(0, 22), textcoords="offset points", zorder=5,
                           arrowprops={"arrowstyle": "<-", "color": colour, "linewidth": 1.2})  # fmt: skip
