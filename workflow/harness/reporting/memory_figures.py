"""Accuracy against memory: which methods no other beats in both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from harness.records.units import GIB, MIB
from harness.reporting.frames import Frames
from harness.reporting.layout import cells, of_method, trained
from harness.reporting.quantities import values
from harness.reporting.style import Drawing, Look, empty, grid, legend_below, looks
from harness.study.spec import Study

Point = tuple[float, float]
"""(memory, accuracy)."""


def unbeaten(points: Mapping[str, Point]) -> list[str]:
    """Methods for which no other has at least their accuracy with at most their memory, by memory."""
    return sorted(
        (
            method
            for method, (memory, accuracy) in points.items()
            if not any(
                other != (memory, accuracy) and other[0] <= memory and other[1] >= accuracy for other in points.values()
            )
        ),
        key=lambda method: points[method],
    )


def accuracy_and_memory(frames: Frames, study: Study, model: str) -> Drawing | None:
    """A panel a task whose suites are written: a marker a method, a line through the methods that none beats.

    Memory is NVML's peak of the whole process; in a study without one, the peak of the optimizer's state. None if no
    task of the study has such suites.
    """
    suites: dict[str, list[str]] = {}
    for task, suite in cells(study, "written"):
        suites.setdefault(task, []).append(suite)
    if not suites:
        return None
    runs = frames.ok_runs()
    on_card = bool(runs.loc[runs["model"] == model, "nvml_process_peak_bytes"].notna().any())
    column, unit, name = (
        ("nvml_process_peak_bytes", GIB, "peak memory of the process (GiB, NVML)")
        if on_card
        else ("state_peak_bytes", MIB, "optimizer state, peak (MiB)")
    )
    style = looks(study)
    figure, axes = grid(1, len(suites), height=2.9)
    shown: dict[str, Any] = {}
    for panel, (task, of_task) in zip(axes[0], suites.items(), strict=True):
        points: dict[str, Point] = {}
        for method in trained(study):
            mine = of_method(runs, model, task, method)
            memory = [float(value) / unit for value in mine[column].dropna()]
            found = [100 * value for value in values(frames, mine, "accuracy", of_task)]
            if memory and found:
                points[method] = (max(memory), fmean(found))
                shown[method] = _marked(panel, points[method], found, style[method])
        if points:
            front = unbeaten(points)
            panel.step(*zip(*(points[method] for method in front), strict=True), where="post", color="#777777",
                       linestyle=(0, (4, 3)), linewidth=0.9, zorder=0)  # fmt: skip
            panel.margins(0.12)
        else:
            empty(panel, "no ok run that is scored on all suites")
        panel.set_title(_title(task, of_task), loc="left")
        panel.set_xlabel(name)
    axes[0][0].set_ylabel("accuracy (%)")
    drawn = [method for method in trained(study) if method in shown]
    legend_below(figure, [shown[method] for method in drawn], drawn)
    return Drawing(
        name=f"accuracy-and-memory--{model}",
        caption=f"Accuracy against memory, model {model}: the plain mean over a task's suites, and {name}, the largest "
        "seed. A marker is a method's mean over its seeds, the bar from its worst to its best seed; the dashed line "
        "joins the methods that no other beats in both. Whether a distance between two markers is more than chance, "
        "the tables of differences say. The axes do not begin at 0.",
        alt=f"Scatter of accuracy against memory by method, model {model}.",
        figure=figure,
    )


def _marked(panel: Any, point: Point, seeds: Sequence[float], look: Look) -> Any:
    """Draw a method; returns what stands for it in the legend."""
    low, high = min(seeds), max(seeds)
    memory, accuracy = point
    (line,) = panel.plot([memory], [accuracy], look.marker, color=look.colour, markersize=6)
    if high > low:
        panel.plot([memory, memory], [low, high], color=look.colour, linewidth=1.0)
    return line


def _title(task: str, suites: list[str]) -> str:
    return f"{task} / {suites[0]}" if len(suites) == 1 else f"{task}, mean of {len(suites)} suites"
