"""A heat map of the decoder layers over time, from a history of steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from grass.trace import Record, read_history

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Value = Literal["importance", "probability", "norm", "age"]

_LABELS = {
    "importance": "mean gradient norm\n(RMS of gradient entries)",
    "probability": "probability",
    "norm": "gradient norm of the step\n(RMS of gradient entries)",
    "age": "steps since measured",
}
_GREY = "#e5e5e5"
_BROKEN = "#ff00ff"
"""Magenta. Its CIELAB distance from every colour of cividis is 42 or more, that of the grey 17 or more, also as seen
with protan, deutan and tritan vision (simulated after Machado, Oliveira and Fernandes 2009)."""


def plot(
    history: Sequence[Record] | str | Path, *, value: Value = "importance", ax: Any = None, title: str | None = None
) -> Figure:
    """Draw one value of every decoder layer over the steps, and mark the layers that train.

    A record is drawn from its step to the step of the next one. White bars with a dark edge mark layers that train.
    Values that were not measured are light grey; a gradient norm that is not finite is magenta. The scale is
    logarithmic if norms span more than a factor of three.

    Args:
        history: `opt.history`, a list of records, or the path of a file that `write_history` wrote.
        value: field of `Record` shown as colour: `importance`, `probability`, `norm` or `age`.
        ax: matplotlib axes to draw on, in a figure made with `layout="constrained"`, which leaves space for the legend
            below the axes; by default the axes of a new figure that is not registered with pyplot (nothing to close).
        title: title above the axes.

    Returns:
        The figure of the axes; `savefig` writes it.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: an unknown `value`, a history that is empty or has no entry of `value`, steps that do not ascend,
            records with different numbers of layers, or (from `read_history`) a bad line of the file.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("grass.heatmap.plot needs matplotlib: pip install matplotlib") from error

    if value not in get_args(Value):
        raise ValueError(f"value must be one of {', '.join(get_args(Value))}, not {value!r}")
    records = read_history(history) if isinstance(history, str | Path) else list(history)
    _check(records, value)
    layers = len(records[0].probability)
    if ax is None:
        figure = Figure(figsize=(7.2, min(max(1.8 + 0.13 * layers, 3.4), 8.0)), layout="constrained")
        ax = figure.subplots()
    values, measured = _matrix(records, value)
    edges = [*(record.step for record in records), records[-1].step + 1]
    grey = _draw_cells(ax, values, measured, edges, value)
    marks = _draw_active(ax, records, edges, share=0.2 if value == "norm" else 0.3)
    ax.set_xlim(edges[0], edges[-1])
    ax.set_ylim(-0.5, layers - 0.5)
    ax.set_xlabel("step")
    ax.set_ylabel("decoder layer")
    ax.grid(visible=False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_locator().set_params(integer=True)
    if title is not None:
        ax.set_title(title)
    _explain(ax, [*marks, *grey])
    drawn: Figure = ax.get_figure(root=True)
    return drawn


def _check(records: list[Record], value: Value) -> None:
    if not records:
        raise ValueError("history is empty: make a step with the optimizer before plotting")
    for before, after in pairwise(records):
        if after.step <= before.step:
            raise ValueError(f"history must have ascending steps, but step {after.step} follows step {before.step}")
    counts = sorted({len(record.probability) for record in records})
    if len(counts) > 1:
        raise ValueError(f"history must be of one model, but its records have {' and '.join(map(str, counts))} layers")
    if all(row is None or all(v is None for v in row) for row in (getattr(record, value) for record in records)):
        raise ValueError(f"value={value!r} was not measured in any step of this history: choose value='probability'")


def _matrix(records: list[Record], value: Value) -> tuple[Any, Any]:
    """Values and whether they were measured, both of shape (layers, records); non-finite values become infinity."""
    import numpy as np

    nothing = (None,) * len(records[0].probability)
    found = np.array([getattr(record, value) or nothing for record in records], dtype=object).T
    measured = found != None  # noqa: E711  # entry by entry
    values = np.where(measured, found, 0).astype(np.float64)
    return np.where(np.isfinite(values), values, np.inf), measured


def _draw_cells(ax: Any, values: Any, measured: Any, edges: list[int], value: Value) -> list[Any]:
    """Draw the mesh and its colour bar; return legend handles for grey and magenta, for those that occur."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.patches import Patch

    # equal neighbouring records become one column: importance changes once in a period, not in every step
    changes = ((values[:, 1:] != values[:, :-1]) | (measured[:, 1:] != measured[:, :-1])).any(axis=0)
    first = np.flatnonzero(np.concatenate([[True], changes]))
    values, measured = values[:, first], measured[:, first]
    x = np.append(np.asarray(edges)[first], edges[-1])
    y = np.arange(len(values) + 1) - 0.5
    norm, extend = _scale(values[measured & np.isfinite(values)], value)
    # a logarithmic scale cannot show zero and no scale shows infinity: zero gets the lowest colour, infinity "over"
    drawn = np.where(np.isinf(values), 2 * norm.vmax, np.maximum(values, norm.vmin))
    shown = np.ma.masked_array(drawn, mask=~measured)
    colours = colormaps["cividis"].with_extremes(over=_BROKEN)
    ax.set_facecolor(_GREY)
    mesh = ax.pcolormesh(x, y, shown, norm=norm, cmap=colours, rasterized=True)
    bar = ax.get_figure(root=False).colorbar(mesh, ax=ax, pad=0.015, extend=extend)
    bar.set_label(_LABELS[value])
    if value == "age":
        bar.ax.yaxis.get_major_locator().set_params(integer=True)
    handles = []
    if not measured.all():
        why = "not measured (layer asleep)" if value == "norm" else "not measured yet (probing)"
        handles.append(Patch(facecolor=_GREY, edgecolor="#8a8a8a", label=why))
    if np.isinf(values[measured]).any():
        handles.append(Patch(facecolor=_BROKEN, label="not a finite number"))
    return handles


def _scale(values: Any, value: Value) -> tuple[Any, str]:
    """Colour scale over finite `values`, and which end of the colour bar some values exceed."""
    from matplotlib.colors import LogNorm, Normalize

    if value == "age":
        return Normalize(0, max(values.max(), 1)), "neither"
    positive = values[values > 0]
    if value != "probability" and positive.size and positive.max() > 3 * positive.min():
        return LogNorm(positive.min(), positive.max()), "min" if positive.size < values.size else "neither"
    low, high = (values.min(), values.max()) if values.size else (0.0, 1.0)
    # at least a tenth of the midpoint wide, so that rounding errors do not fill the scale when all layers are equal
    middle = (low + high) / 2 or 1.0
    return Normalize(min(low, 0.95 * middle), max(high, 1.05 * middle)), "neither"


def _draw_active(ax: Any, records: list[Record], edges: list[int], *, share: float) -> list[Any]:
    """Mark each run of steps in which a layer trains by a bar over `share` of its row; return a legend handle.

    All bars together are one artist and their dark edges another.
    """
    import numpy as np
    from matplotlib import patheffects
    from matplotlib.lines import Line2D

    layers = len(records[0].probability)
    active = np.zeros((layers, len(records) + 2), dtype=np.int8)
    for i, record in enumerate(records, start=1):
        active[list(record.active), i] = 1
    turns = np.diff(active)
    # both are sorted by layer, then step, so the n-th start belongs to the n-th end
    rows, starts = np.nonzero(turns == 1)
    _, ends = np.nonzero(turns == -1)
    if not rows.size:
        return []
    x = np.asarray(edges)
    row = ax.get_window_extent().height * 72 / ax.get_figure(root=True).dpi / layers
    width = min(2.0, share * row)
    for colour, thick in (("black", 1.6 * width), ("white", width)):
        ax.hlines(rows, x[starts], x[ends], color=colour, linewidth=thick, capstyle="butt", snap=False)
    edge = [patheffects.Stroke(linewidth=3.2, foreground="black"), patheffects.Normal()]
    return [Line2D([], [], color="white", linewidth=2, path_effects=edge, label="layer trains in these steps")]


def _explain(ax: Any, handles: list[Any]) -> None:
    """Put the legend under the axis label, a fixed number of points below the axes."""
    from matplotlib.transforms import ScaledTranslation

    if handles:
        inches = ax.get_figure(root=True).dpi_scale_trans
        below = ax.transAxes + ScaledTranslation(0, -34 / 72, inches)
        # an entry is about 2.3 inches wide; a legend much wider than its axes would leave them no space
        columns = int(ax.get_window_extent().transformed(inches.inverted()).width / 2.3)
        ax.legend(
            handles=handles,
            loc="upper center",
            bbox_to_anchor=(0.5, 0),
            bbox_transform=below,
            ncols=min(max(columns, 1), len(handles)),
            frameon=False,
            handlelength=2.4,
        )
