"""Accuracy beside held-out loss with every seed visible, and the bars of memory and throughput."""

from __future__ import annotations

from typing import Any

import numpy as np

from harness.records.units import MIB
from harness.reporting.frames import Frames
from harness.reporting.layout import VALIDATION, loss_cells, of_method, protocol, trained
from harness.reporting.score_tables import HELDOUT_LOSS, scores_of
from harness.reporting.style import Drawing, empty, grid, looks
from harness.study.spec import Study


def result_cells(study: Study) -> list[tuple[str, str]]:
    """(task, suite) that have a row of panels: what is scored otherwise has tables alone."""
    return [(task, suite) for task, suite in loss_cells(study) if protocol(study, task, suite) == "written"]


def result_dots(frames: Frames, study: Study, model: str) -> Drawing:
    """One row of panels a suite: accuracy left, held-out loss right; a dot a seed, a bar at the mean.

    Raises ValueError if the study has no suite whose answers are written, and no task without suites.
    """
    suites = result_cells(study)
    if not suites:
        raise ValueError("no suite to draw")
    methods = trained(study)
    style = looks(study)
    figure, axes = grid(len(suites), 2, height=(0.24 * len(methods) + 0.75) * len(suites) + 0.2, sharey=True)
    scores = scores_of(frames, study, HELDOUT_LOSS)
    for row, (task, suite) in zip(axes, suites, strict=True):
        of_suite = scores[scores["suite"] == suite]
        for place, method in enumerate(methods):
            mine = of_method(of_suite, model, task, method)
            for panel, column, scale in ((row[0], "accuracy", 100.0), (row[1], "heldout_loss", 1.0)):
                values = scale * mine[column].dropna().to_numpy(dtype=np.float64)
                _dots(panel, values, place, style[method])
        if suite == VALIDATION:
            empty(row[0], "no suite: the loss alone")
        chance = of_suite.loc[(of_suite["task"] == task), "chance"].dropna()
        if len(chance):
            row[0].axvline(100 * float(chance.iloc[0]), color="#777777", linestyle=(0, (4, 3)), linewidth=0.9)
        for panel in row:
            panel.set_ylim(len(methods) - 0.4, -0.6)
            panel.grid(visible=False, axis="y")
            panel.margins(x=0.08)
        row[0].set_yticks(range(len(methods)), methods)
        row[0].set_title(f"{task} / {suite}", loc="left")
    axes[-1][0].set_xlabel("accuracy (%)")
    axes[-1][1].set_xlabel("held-out loss (nats per answer token; lower is better)")
    return Drawing(
        name=f"results--{model}",
        caption=f"Accuracy (left) and held-out loss (right) of every ok run, model {model}. "
        "A dot is a seed, the bar their mean; dashed: chance level, where there is one. "
        "The axes do not begin at 0. A method without dots has no ok run. The untrained model would stretch the axes; "
        "it is in the tables.",
        alt=f"Dot plots of accuracy and held-out loss by method and suite, model {model}.",
        figure=figure,
    )


def _dots(panel: Any, values: Any, place: int, look: Any) -> None:
    if len(values):
        panel.plot(
            values, np.full(len(values), place), look.marker, color=look.colour, markersize=5, alpha=0.65,
            markeredgewidth=0,
        )  # fmt: skip
        panel.plot([values.mean()] * 2, [place - 0.32, place + 0.32], color=look.colour, linewidth=1.6, zorder=1)


def efficiency_bars(frames: Frames, study: Study, model: str) -> Drawing:
    """Optimizer-state bytes and tokens per second; a bar is the table's figure, a dot a seed."""
    tasks = list(study.tasks)
    methods = trained(study)
    figure, axes = grid(len(tasks), 2, height=(0.26 * len(methods) + 0.8) * len(tasks) + 0.2, sharey=True, sharex="col")
    style = looks(study)
    for row, task in zip(axes, tasks, strict=True):
        for place, method in enumerate(methods):
            runs = of_method(frames.ok_runs(), model, task, method)
            for panel, column, scale, middle in (
                (row[0], "state_peak_bytes", 1 / MIB, np.max),
                (row[1], "throughput_tokens_per_s", 1.0, np.median),
            ):
                values = scale * runs[column].dropna().to_numpy(dtype=np.float64)
                if len(values):
                    panel.barh(place, middle(values), height=0.62, color=style[method].colour, alpha=0.45)
                    panel.plot(values, np.full(len(values), place), "o", color="#222222", markersize=2.6)
                else:
                    panel.text(
                        0, place, "  no ok run" if runs.empty else "  not measured", va="center", color="#555555"
                    )
        row[0].set_yticks(range(len(methods)), methods)
        row[0].set_ylim(len(methods) - 0.4, -0.6)
        row[0].set_title(task, loc="left")
        for panel in row:
            panel.grid(visible=False, axis="y")
            panel.set_xlim(left=0)
    axes[-1][0].set_xlabel("optimizer state, peak (MiB)")
    axes[-1][1].set_xlabel("throughput (non-padding tokens per second)")
    return Drawing(
        name=f"efficiency--{model}",
        caption=f"Peak optimizer state (sleeping moments included) and training throughput, model {model}. A dot is a "
        "seed; bars as in the table: the largest seed for memory, the median for throughput.",
        alt=f"Bar charts of optimizer-state memory and tokens per second by method, model {model}.",
        figure=figure,
    )
