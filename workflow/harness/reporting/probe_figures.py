"""Figures of where importance lies: norms by layer and task, the order compared between tasks, and over training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from harness.records.columns import ALL
from harness.reporting.drift import Drift, drifts
from harness.reporting.frames import Frames
from harness.reporting.probed import OfTask, compared, probed_norms, probed_tasks
from harness.reporting.stats import Array
from harness.reporting.style import (
    SEEDS_DRAWN,
    Drawing,
    Look,
    a_line_a_seed,
    empty,
    grid,
    legend_below,
    looks,
    looks_of,
)
from harness.reporting.table import percent
from harness.study.spec import Study

COLUMNS = 3
"""Panels side by side: with more, a panel of a printed page is too narrow for thirty layers."""
BAND = (0.1, 0.9)
"""Quantiles over batches at the edges of a band."""
_GREY = "#9a9a9a"


def probe_figures(frames: Frames, study: Study, model: str) -> Iterator[Drawing]:
    """The figures of a model's probes; none without one that ended ok."""
    tasks = probed_tasks(frames, study, model)
    if tasks:
        yield norms_by_task(tasks, model)
        yield norms_by_block(frames, tasks, model)
    if len(tasks) > 1:
        yield task_correlations(tasks, model)


def _panels(count: int, *, height: float, **options: Any) -> tuple[Any, list[Any]]:
    """A figure and `count` axes in rows of `COLUMNS`; `height` inches a row."""
    columns = min(count, COLUMNS)
    rows = -(-count // columns)
    figure, axes = grid(rows, columns, height=height * rows + 0.6, **options)
    flat = list(axes.flat)
    for spare in flat[count:]:
        spare.set_axis_off()
    return figure, flat[:count]


def _ratio_axis(panel: Any, lowest: float, highest: float) -> None:
    """A logarithmic axis of ratios to the mean, so that half and twice are equally far from 1."""
    panel.set_yscale("log")
    panel.set_ylim(0.93 * lowest, 1.07 * highest)
    # a locator for decades leaves a range of less than one without a tick
    locator = LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)) if highest > 3 * lowest else MaxNLocator(5)
    panel.yaxis.set_major_locator(locator)
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_locator(NullLocator())


def _layer_axes(panels: list[Any]) -> None:
    """Label the lowest panel of each column, wherever the last row ends."""
    columns = min(len(panels), COLUMNS)
    for place, panel in enumerate(panels):
        lowest = place + columns >= len(panels)
        panel.tick_params(labelbottom=lowest)
        panel.set_xlabel("layer (0: lowest)" if lowest else "")
        panel.xaxis.get_major_locator().set_params(integer=True)


def norms_by_task(tasks: dict[str, OfTask], model: str) -> Drawing:
    """All tasks in one panel, then each with its spread over batches (paper, Figure 1)."""
    style = looks_of(tasks)
    figure, panels = _panels(len(tasks) + 1, height=2.1, sharex=True, sharey=True)
    by_batch = {name: task.norms / task.norms.mean(axis=1, keepdims=True) for name, task in tasks.items()}
    bands = {name: np.quantile(values, BAND, axis=0) for name, values in by_batch.items()}
    handles = {}
    for name, task in tasks.items():
        handles[name] = _line(panels[0], task.relative, style[name])
    panels[0].set_title("all tasks")
    for panel, (name, task) in zip(panels[1:], tasks.items(), strict=True):
        for other in tasks:
            if other != name:
                panel.plot(tasks[other].relative, color=_GREY, linewidth=0.7, alpha=0.7)
        panel.fill_between(range(len(task.relative)), *bands[name], color=style[name].colour, alpha=0.22, linewidth=0)
        _line(panel, task.relative, style[name])
        panel.set_title(name)
    edges = np.concatenate([band.ravel() for band in bands.values()])
    for panel in panels:
        panel.axhline(1, color="#777777", linewidth=0.7)
        _ratio_axis(panel, float(edges.min()), float(edges.max()))
    _layer_axes(panels)
    for panel in panels[::COLUMNS]:
        panel.set_ylabel("norm / mean over layers")
    legend_below(
        figure,
        [*handles.values(), Patch(color=_GREY, alpha=0.35), Line2D([], [], color=_GREY, linewidth=0.7)],
        [*handles, f"{percent(BAND[0], 0)} to {percent(BAND[1], 0)} of batches", "the other tasks"],
    )
    batches = sorted({task.norms.shape[0] for task in tasks.values()})
    return Drawing(
        name=f"probe-norms--{model}",
        caption=f"Importance of every layer before training, by task, model {model}: root mean square of the "
        f"gradient's entries, mean over {' or '.join(map(str, batches))} batches, divided by the mean over layers. "
        "First panel: all tasks. Others: the band is the spread over single batches, each divided by its own mean; "
        "grey lines are the other tasks.",
        alt=f"Line charts of relative gradient norm by layer for each task, with bands over batches, model {model}.",
        figure=figure,
    )


def _line(panel: Any, values: Array, look: Look, **options: Any) -> Any:
    (line,) = panel.plot(
        values, color=look.colour, linestyle=look.line, marker=look.marker, markersize=2.6, linewidth=1.1, **options
    )
    return line


def norms_by_block(frames: Frames, tasks: dict[str, OfTask], model: str) -> Drawing:
    """The same for each kind of block within a layer, relative to the mean of whole layers."""
    of_model = frames.probed[(frames.probed["model"] == model) & (frames.probed["kind"] != ALL)]
    kinds = list(dict.fromkeys(of_model["kind"]))
    style = looks_of(tasks)
    figure, panels = _panels(len(kinds), height=2.3, sharex=True)
    handles: dict[str, Any] = {}
    for panel, kind in zip(panels, kinds, strict=True):
        seen = []
        for name, task in tasks.items():
            norms = probed_norms(frames, model, name, kind)
            if norms is None:
                continue
            relative = norms.mean(axis=0) / task.norms.mean()
            seen.append(relative)
            handles[name] = _line(panel, relative, style[name])
        sizes = of_model.loc[of_model["kind"] == kind, "parameters"]
        panel.set_title(f"{kind} ({float(sizes.median()):,.0f} parameters)")
        _ratio_axis(panel, float(np.min(seen)), float(np.max(seen)))
    _layer_axes(panels)
    panels[0].set_ylabel("norm / mean of layers")
    legend_below(figure, list(handles.values()), list(handles))
    return Drawing(
        name=f"probe-blocks--{model}",
        caption=f"The parts of each layer, model {model}: root mean square of the gradient's entries in each kind of "
        "block, divided by the mean over whole layers. A layer's importance is the root mean square over all of its "
        "entries, so a block counts by its number of parameters. Scales differ between panels.",
        alt=f"Line charts of gradient norm by layer for each kind of block, one line a task, model {model}.",
        figure=figure,
    )


def task_correlations(tasks: dict[str, OfTask], model: str) -> Drawing:
    """One row a pair of tasks: rank correlation beside its ceiling."""
    pairs = sorted(compared(tasks), key=lambda pair: pair.rho.value)
    figure, axes = grid(1, 1, height=0.27 * len(pairs) + 1.5)
    panel = axes[0][0]
    for row, pair in enumerate(pairs):
        differ = pair.verdict == "differ"
        panel.plot([pair.rho.low, pair.rho.high], [row, row], color="#0072B2", linewidth=1.6, zorder=2)
        panel.plot(
            pair.rho.value, row, "o", color="#0072B2", markerfacecolor="#0072B2" if differ else "white", markersize=6,
            zorder=3,
        )  # fmt: skip
        panel.plot([pair.halves, pair.ceiling], [row, row], color=_GREY, linewidth=0.8, linestyle=":", zorder=1)
        panel.plot(pair.halves, row, "x", color="#000000", markersize=5, zorder=4)
        panel.plot(pair.ceiling, row, "D", color="#D55E00", markersize=5, zorder=4)
    panel.axvline(1, color="#777777", linewidth=0.8)
    panel.set_yticks(range(len(pairs)), labels=[f"{pair.first}, {pair.second}" for pair in pairs])
    panel.set_ylim(-0.6, len(pairs) - 0.4)
    panel.set_xlabel("rank correlation over layers")
    legend_below(
        figure,
        [
            Line2D([], [], color="#0072B2", marker="o", markersize=6),
            Line2D([], [], color="#000000", marker="x", linestyle=""),
            Line2D([], [], color="#D55E00", marker="D", markersize=5, linestyle=""),
        ],
        ["two tasks (filled: they differ)", "halves of two tasks", "halves of one task"],
    )
    return Drawing(
        name=f"probe-correlations--{model}",
        caption=f"Is the order of the layers the same in two tasks? Model {model}. Circles: rank correlation of the "
        "mean norms of all batches, with its 95 % interval over batches; filled where the order differs (p < 0.05 by "
        "permutation, Holm). Cross and diamond have half of the batches on each side and can be compared: the cross "
        "between two tasks, the diamond between two halves of one task (mean of both), which is what noise alone "
        "leaves.",
        alt=f"Dot plot of rank correlations between pairs of tasks with intervals and ceilings, model {model}.",
        figure=figure,
    )


def drift_curves(frames: Frames, study: Study, model: str) -> Drawing | None:
    """Rank correlation of each step's norms with those of step 0 (paper, Figure 2); None if nothing was observed."""
    moving = [drift for drift in drifts(frames, study) if drift.model == model]
    if not moving:
        return None
    tasks = list(study.tasks)
    style = looks(study)
    handles: dict[str, Any] = {}
    figure, panels = _panels(len(tasks), height=2.4, sharey=True)
    for panel, task in zip(panels, tasks, strict=True):
        of_task = [drift for drift in moving if drift.task == task]
        panel.set_title(task)
        panel.set_xlabel("optimizer step")
        if not of_task:
            empty(panel, "no ok run was observed")
            continue
        _noise(panel, of_task[0], handles)
        for drift in of_task:
            look = style[drift.method]
            for curve in drift.curves[:SEEDS_DRAWN]:
                (line,) = panel.plot(
                    curve["step"], curve["rho"], color=look.colour, linestyle=look.line, marker=look.marker,
                    markersize=2.5, linewidth=1.1,
                )  # fmt: skip
                handles[drift.method] = line
        panel.axhline(1, color="#777777", linewidth=0.8)
    for panel in panels[::COLUMNS]:
        panel.set_ylabel("rank correlation\nwith step 0")
    order = sorted(handles, key=lambda name: name not in study.methods)
    legend_below(figure, [handles[name] for name in order], order)
    return Drawing(
        name=f"drift--{model}",
        caption=f"Does the order of the layers change over training? Model {model}, {a_line_a_seed(study)}: rank "
        "correlation over layers of the observer's norms at a step with those at step 0, on the same rows. Grey: the "
        "correlation between two choices of as many rows before training, 5 % to 95 % of choices and their mean "
        "(dashed); a line below it has changed by more than another choice of rows would. No grey: the study has no "
        "probe.",
        alt=f"Line charts of rank correlation with step 0 over training for every method, model {model}.",
        figure=figure,
    )


def _noise(panel: Any, drift: Drift, handles: dict[str, Any]) -> None:
    if drift.noise is None:
        return
    low, high = np.quantile(drift.noise.rho, [0.05, 0.95])
    handles["two choices of rows"] = panel.axhspan(low, high, color=_GREY, alpha=0.3, linewidth=0)
    panel.axhline(float(drift.noise.rho.mean()), color="#555555", linewidth=0.9, linestyle=(0, (4, 3)))
