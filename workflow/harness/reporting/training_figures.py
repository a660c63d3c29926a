"""Loss curves and learning-rate curves."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from pandas import DataFrame

from harness.reporting.frames import Frames
from harness.reporting.layout import of_method, trained
from harness.reporting.style import Drawing, empty, grid, legend_below, looks
from harness.study.spec import Study


def window_steps(steps: int) -> int:
    """Steps of the trailing mean that smooths a training loss: a twentieth of the run, at least 1."""
    return max(1, steps // 20)


def smoothed(steps: DataFrame, window: int) -> DataFrame:
    """Training losses as a matrix, index = step, columns = run, each a trailing mean over `window` steps."""
    table = steps.pivot(index="step", columns="run", values="loss").astype("float64").sort_index()
    return table.rolling(window, min_periods=window).mean()


def loss_curves(frames: Frames, study: Study, model: str) -> Drawing:
    """Training loss above, the observer's validation loss below; one column a task."""
    figure, axes = grid(2, len(study.tasks), height=4.6, sharex="col")
    style = looks(study)
    drawn: dict[str, Any] = {}
    windows = []
    for column, task in enumerate(study.tasks):
        of_task = frames.ok_runs()[(frames.ok_runs()["model"] == model) & (frames.ok_runs()["task"] == task)]
        longest = of_task["steps"].max()
        window = window_steps(int(longest)) if len(of_task) else 1
        windows.append(f"{window} steps ({task})")
        for method in trained(study):
            runs = list(of_method(of_task, model, task, method)["run"])
            steps = frames.steps[frames.steps["run"].isin(runs)]
            seen = frames.observed[frames.observed["run"].isin(runs)]
            matrices = [
                smoothed(steps, window),
                seen.drop_duplicates(["run", "step"]).pivot(index="step", columns="run", values="validation_loss"),
            ]
            for row, matrix in enumerate(matrices):
                if matrix.empty:
                    continue
                drawn[method] = _band(axes[row][column], matrix.astype("float64"), style[method])
        axes[0][column].set_title(task)
        axes[1][column].set_xlabel("optimizer step")
        for row in range(2):
            if axes[row][column].lines:
                _log_scale(axes[row][column])
            else:
                empty(axes[row][column], "no ok run recorded steps here")
    axes[0][0].set_ylabel("training loss\n(nats per token)")
    axes[1][0].set_ylabel("validation loss\n(nats per answer token)")
    legend_below(figure, list(drawn.values()), list(drawn))
    return Drawing(
        name=f"loss--{model}",
        caption=f"Loss during training, model {model}. Lines: mean over the ok seeds; bands: lowest to highest seed. "
        f"Above: training loss, trailing mean over {', '.join(windows)}. Below: the observer's loss on fixed "
        "validation rows, not smoothed.",
        alt=f"Line charts of training and validation loss against optimizer step for every method, model {model}.",
        figure=figure,
    )


def _band(axes: Any, matrix: DataFrame, look: Any) -> Any:
    x = matrix.index.to_numpy(dtype=np.float64)
    values = matrix.to_numpy(dtype=np.float64)
    known = ~np.isnan(values).all(axis=1)
    x, values = x[known], values[known]
    (line,) = axes.plot(x, np.nanmean(values, axis=1), color=look.colour, linestyle=look.line)
    if values.shape[1] > 1:
        low, high = np.nanmin(values, axis=1), np.nanmax(values, axis=1)
        axes.fill_between(x, low, high, color=look.colour, alpha=0.15, linewidth=0)
    return line


def _log_scale(axes: Any) -> None:
    """Losses fall by orders of magnitude: on a linear axis the first steps take all the height."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def rate_curves(frames: Frames, study: Study, model: str) -> Drawing:
    """Validation loss against learning rate; the chosen point ringed, points beyond the grid open."""
    tasks = list(study.tasks)
    figure, axes = grid(1, len(tasks), height=3.1)
    style = looks(study)
    drawn: dict[str, Any] = {}
    lost = 0
    for panel, task in zip(axes[0], tasks, strict=True):
        for method, look in style.items():
            trials = of_method(frames.trials, model, task, method)
            usable = trials[(trials["status"] == "ok") & trials["validation_loss"].notna()]
            lost += len(trials) - len(usable)
            if usable.empty:
                continue
            points = usable.groupby("lr").agg(
                loss=("validation_loss", "mean"), extension=("extension", "any"), selected=("selected", "any")
            )
            x, y = points.index.to_numpy(dtype=np.float64), points["loss"].to_numpy(dtype=np.float64)
            panel.plot(x, y, color=look.colour, linestyle=look.line, zorder=2)
            for rate, loss, extension, selected in zip(x, y, points["extension"], points["selected"], strict=True):
                face = "white" if extension else look.colour
                panel.plot(rate, loss, look.marker, color=look.colour, markerfacecolor=face, markersize=5, zorder=3)
                if selected:
                    panel.plot(rate, loss, "o", color="#000000", markerfacecolor="none", markersize=11, zorder=4)
            drawn[method] = Line2D([], [], color=look.colour, linestyle=look.line, marker=look.marker, markersize=5)
        if panel.lines:
            panel.set_xscale("log")
            _log_scale(panel)
        else:
            empty(panel, "no learning rate was searched here")
        panel.set_title(task)
        panel.set_xlabel("peak learning rate")
    axes[0][0].set_ylabel("validation loss\n(nats per answer token)")
    if drawn:
        drawn["chosen"] = Line2D(
            [], [], color="#000000", marker="o", markerfacecolor="none", markersize=10, linestyle=""
        )
        drawn["beyond the grid"] = Line2D([], [], color="#555555", marker="o", markerfacecolor="white", linestyle="")
    legend_below(figure, list(drawn.values()), list(drawn))
    return Drawing(
        name=f"learning-rates--{model}",
        caption=f"Choice of the learning rate, model {model}: mean validation loss over the search seeds. "
        f"Ringed: the chosen point; open markers: points added beyond the grid. "
        f"{lost} trials without a loss are not drawn.",
        alt=f"Validation loss against learning rate on a log axis, one curve a method, model {model}.",
        figure=figure,
    )
