"""Importance over time: what layer-wise methods believe, beside what the observer probe measured."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D
from matplotlib.ticker import AutoLocator
from pandas import DataFrame

from harness.reporting.frames import Frames
from harness.reporting.layout import REFERENCE, of_method
from harness.reporting.stats import agreement, effective_layers, layer_matrix
from harness.reporting.style import SEEDS_DRAWN, Drawing, a_line_a_seed, empty, grid, legend_below, looks
from harness.study.spec import Study

LIMIT = 4.0
"""The colour scale ends at this ratio to the mean, and at its inverse."""


def layerwise_methods(frames: Frames, study: Study, model: str) -> list[str]:
    """Methods that chose layers in at least one ok run of the model."""
    runs = frames.ok_runs()
    chosen = set(frames.believed["run"])
    found = set(runs.loc[(runs["model"] == model) & runs["run"].isin(list(chosen)), "method"])
    return [method for method in study.methods if method in found]


def relative(matrix: DataFrame) -> DataFrame:
    """Each step's values divided by their mean over the layers: 1 is an average layer."""
    return matrix.div(matrix.mean(axis=1), axis=0)


def importance_map(frames: Frames, study: Study, model: str, method: str) -> Drawing:
    """One row a task; columns: believed, observed in the same run, and observed under full fine-tuning."""
    tasks = list(study.tasks)
    figure, axes = grid(len(tasks), 3, height=2.3 * len(tasks) + 0.9, sharey=True)
    references = [label for label, entry in study.methods.items() if entry.module == REFERENCE]
    of_model = frames.ok_runs()[(frames.ok_runs()["model"] == model) & (frames.ok_runs()["method"] == method)]
    seeds: list[str] = []
    maps: list[Map] = []
    for row, task in zip(axes, tasks, strict=True):
        run, seed, last = _lowest_seed(frames, model, task, method)
        seeds.append(f"{task}: seed {seed}" if run else f"{task}: no ok run")
        base, _, base_last = _lowest_seed(frames, model, task, references[0]) if references else (None, None, 0)
        believed = frames.believed_by(run) if run else frames.believed.iloc[:0]
        _believed_panel(row[0], believed, last, maps)
        _observed_panel(row[1], frames, run, last, maps)
        _observed_panel(row[2], frames, base, base_last, maps)
        row[0].set_ylabel(f"{task}\nlayer")
    chosen = frames.believed["run"].isin(list(of_model["run"]))
    silent = frames.believed.loc[chosen, "importance"].isna().all()
    left = "layers trained (no importance)" if silent else "believed"
    for panel, title in zip(axes[0], (left, "observed, same run", "observed, full fine-tuning"), strict=True):
        panel.set_title(title)
    for panel in axes[-1]:
        panel.set_xlabel("optimizer step")
    _shade(figure, axes, maps)
    mark = Line2D([], [], color="white", linewidth=2, path_effects=_OUTLINE)
    figure.legend([mark], ["layer trains in these steps"], loc="outside lower center")
    return Drawing(
        name=f"importance--{model}--{method}",
        caption=f"Importance of the layers over time, {method} on {model} "
        f"({'; '.join(seeds)}, the lowest ok seed). "
        "Left: what the method believes, and the layers it trained (bars). Middle: root mean square of the true "
        "gradient of each layer, mean over batches of fixed validation rows, in the same run. Right: the same under "
        "full fine-tuning. "
        "All maps show the ratio to the mean over the layers of that step, on one shared scale, 1/4 to 4 at most "
        "(pointed ends: values beyond). A grey panel: the method keeps no importance. Layer 0 is the lowest.",
        alt=f"Heat maps of layer importance over training steps for {method} on {model}, believed beside observed.",
        figure=figure,
    )


@dataclass(frozen=True, kw_only=True)
class Map:
    """One heat map: steps by layers, drawn between the given step edges."""

    panel: Any
    values: DataFrame
    edges: list[float]


_OUTLINE = [patheffects.Stroke(linewidth=3.2, foreground="#000000"), patheffects.Normal()]


def _lowest_seed(frames: Frames, model: str, task: str, method: str) -> tuple[str | None, int | None, int]:
    runs = of_method(frames.ok_runs(), model, task, method)
    if runs.empty:
        return None, None, 0
    first = runs.iloc[0]
    return str(first["run"]), int(first["seed"]), int(first["steps"])


def _believed_panel(panel: Any, believed: DataFrame, last: int, maps: list[Map]) -> None:
    if believed.empty:
        empty(panel, "no ok run")
        return
    importance = layer_matrix(believed, "importance")
    if importance.notna().any(axis=None):
        # a belief holds until the next one
        maps.append(Map(panel=panel, values=relative(importance), edges=[*map(float, importance.index), float(last)]))
    else:
        panel.set_facecolor("#d9d9d9")
        panel.grid(visible=False)
        panel.set_xlim(0, last)
    for layer, start, end in active_spans(believed, last):
        panel.hlines(layer, start, end, color="white", linewidth=2, path_effects=_OUTLINE, capstyle="butt")
    layers = [*map(int, importance.columns)]
    panel.set_ylim(layers[0] - 0.5, layers[-1] + 0.5)


def active_spans(believed: DataFrame, last: int) -> list[tuple[int, int, int]]:
    """(layer, first step, step after the last) of every interval in which a layer trained."""
    active = believed.pivot(index="step", columns="layer", values="active").astype("boolean").fillna(False).sort_index()
    edges = [*map(int, active.index), last]
    spans: list[tuple[int, int, int]] = []
    for layer in map(int, active.columns):
        for i, on in enumerate(active[layer]):
            if not on or edges[i] >= edges[i + 1]:
                continue
            if spans and spans[-1][0] == layer and spans[-1][2] == edges[i]:
                spans[-1] = (layer, spans[-1][1], edges[i + 1])
            else:
                spans.append((layer, edges[i], edges[i + 1]))
    return spans


def _observed_panel(panel: Any, frames: Frames, run: str | None, last: int, maps: list[Map]) -> None:
    observed = frames.observed_by(run) if run else frames.observed.iloc[:0]
    if observed.empty:
        empty(panel, "no ok run" if run is None else "not observed")
        return
    values = layer_matrix(observed, "gradient_rms")
    steps = [*map(float, values.index)]
    # a measurement stands for the steps that are nearer to it than to any other
    edges = [steps[0], *((a + b) / 2 for a, b in pairwise(steps)), max(float(last), steps[-1])]
    maps.append(Map(panel=panel, values=relative(values), edges=edges))


def _shade(figure: Any, axes: Any, maps: list[Map]) -> None:
    """Draw all maps on one logarithmic scale of ratios."""
    values = np.concatenate([m.values.to_numpy(dtype=np.float64).ravel() for m in maps]) if maps else np.zeros(0)
    values = values[np.isfinite(values) & (values > 0)]
    if values.size == 0:
        return
    # the limits keep one collapsed belief from using up the colour scale of all other maps
    low, high = max(float(values.min()), 1 / LIMIT), min(float(values.max()), LIMIT)
    low, high = min(low, 0.95), max(high, 1.05)
    ends = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}
    extend = ends[bool(values.min() < low), bool(values.max() > high)]
    norm = LogNorm(low, high)
    for m in maps:
        layers = [*map(int, m.values.columns)]
        m.panel.pcolormesh(
            m.edges,
            [layers[0] - 0.5, *(layer + 0.5 for layer in layers)],
            np.clip(m.values.to_numpy(dtype=np.float64).T, low, high),
            norm=norm,
            cmap="cividis",
            rasterized=True,
        )
        # a method without beliefs may never have drawn the top layer; the observer measured all layers
        m.panel.set_ylim(layers[0] - 0.5, layers[-1] + 0.5)
        m.panel.grid(visible=False)
        # a locator of our own: a panel that says why it is empty has taken the ticks of all that share its axis
        locator = AutoLocator()
        locator.set_params(integer=True)
        m.panel.yaxis.set_major_locator(locator)
    bar = figure.colorbar(ScalarMappable(norm=norm, cmap="cividis"), ax=axes, shrink=0.8, pad=0.015, extend=extend)
    ticks = [t for t in (0.25, 0.35, 0.5, 0.7, 1, 1.5, 2, 3, 4) if low <= t <= high]
    bar.set_ticks(ticks, labels=[f"{t:g}" for t in ticks])
    bar.ax.minorticks_off()
    bar.set_label("ratio to the mean over layers")


def agreement_curves(frames: Frames, study: Study, model: str) -> Drawing:
    """Rank correlation of believed and observed importance, and the effective number of layers, over time."""
    tasks = list(study.tasks)
    figure, axes = grid(2, len(tasks), height=4.6, sharex="col", sharey="row")
    style = looks(study)
    drawn: dict[str, Any] = {}
    for column, task in enumerate(tasks):
        total = 0
        for method in layerwise_methods(frames, study, model):
            look = style[method]
            runs = of_method(frames.ok_runs(), model, task, method)[["run", "steps"]]
            for run, last in runs[:SEEDS_DRAWN].itertuples(index=False):
                believed = frames.believed_by(run)
                if believed.empty:
                    continue
                total = max(total, int(believed["layer"].max()) + 1)
                rho = agreement(believed, frames.observed_by(run)).dropna()
                spread = effective_over_time(believed, int(last))
                options = {"color": look.colour, "linestyle": look.line, "linewidth": 1.1}
                if len(spread):
                    (drawn[method],) = axes[1][column].plot(
                        spread["step"], spread["layers"], drawstyle="steps-post", **options
                    )
                if len(rho):
                    (drawn[method],) = axes[0][column].plot(
                        rho["step"], rho["rho"], marker=look.marker, markersize=2.5, **options
                    )
        axes[0][column].axhline(0, color="#777777", linewidth=0.8)
        axes[0][column].set_ylim(-1.05, 1.05)
        if total:
            line = axes[1][column].axhline(total, color="#777777", linewidth=0.8, linestyle=(0, (4, 3)))
            drawn["all layers equally likely"] = line
        axes[1][column].set_ylim(bottom=0)
        axes[0][column].set_title(task)
        axes[1][column].set_xlabel("optimizer step")
        for row in range(2):
            if len(axes[row][column].lines) < 2:
                axes[row][column].text(
                    0.5, 0.3, "no ok run with an importance", ha="center", transform=axes[row][column].transAxes
                )
    axes[0][0].set_ylabel("rank correlation,\nbelieved and observed")
    axes[1][0].set_ylabel("effective number\nof layers")
    order = sorted(drawn, key=lambda name: name not in study.methods)
    legend_below(figure, [drawn[name] for name in order], order)
    return Drawing(
        name=f"agreement--{model}",
        caption=f"Is the belief true, and how choosy is it? Model {model}, {a_line_a_seed(study)}. Above: Spearman's "
        "rank correlation over the layers between believed importance and the observed gradient's root mean square "
        "(1: same order, 0: unrelated). Below: exp of the entropy of the sampling probabilities; the dashed line is "
        "uniform sampling. GRASS with `temperature: auto` keeps that number level, by its choice of temperature. "
        "Methods that keep no importance or no probabilities have no line.",
        alt=f"Line charts of rank correlation and effective number of layers over training, model {model}.",
        figure=figure,
    )


def effective_over_time(believed: DataFrame, last: int) -> DataFrame:
    """Columns `step` and `layers` of one run; the last value holds until step `last`."""
    matrix = layer_matrix(believed, "probability").dropna()
    rows = [
        {"step": int(step), "layers": effective_layers(list(values))}
        for step, values in zip(matrix.index, matrix.to_numpy(dtype=np.float64), strict=True)
    ]
    if rows and rows[-1]["step"] < last:
        rows.append({"step": last, "layers": rows[-1]["layers"]})
    return DataFrame(rows, columns=["step", "layers"])
