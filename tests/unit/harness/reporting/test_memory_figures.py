"""Accuracy against memory: who is beaten, and that a marker stands where the records say."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import reporting_data as data
from harness.records.units import GIB, MIB
from harness.reporting.memory_figures import accuracy_and_memory, unbeaten
from harness.reporting.style import styled
from matplotlib import pyplot as plt


def test_who_is_beaten_in_both() -> None:
    points = {
        "a": (1.0, 50.0),
        "b": (2.0, 60.0),
        "c": (3.0, 55.0),
        "d": (2.0, 59.0),
        "e": (0.5, 50.0),
        "f": (2.0, 60.0),
    }
    assert unbeaten(points) == ["e", "b", "f"]
    assert unbeaten({"alone": (1.0, 0.0)}) == ["alone"]


def test_a_marker_stands_at_the_mean_over_suites_and_seeds() -> None:
    frames, study = data.frames(), data.study()
    (model, *_), (task, *_) = study.models, study.tasks
    suites = list(study.tasks[task].suites)
    runs = frames.runs[
        (frames.runs["status"] == "ok") & (frames.runs["task"] == task) & (frames.runs["method"] == "grass")
    ]
    scores = frames.scores[frames.scores["run"].isin(list(runs["run"]))]
    each = [
        100 * fmean(scores.loc[(scores["run"] == run) & scores["suite"].isin(suites), "accuracy"])
        for run in runs["run"]
    ]
    for on_card, column, unit in ((False, "state_peak_bytes", MIB), (True, "nvml_process_peak_bytes", GIB)):
        peaks = frames.runs["state_peak_bytes"] * 64 if on_card else None
        measured = replace(frames, runs=frames.runs.assign(nvml_process_peak_bytes=peaks))
        with styled():
            drawing = accuracy_and_memory(measured, study, model)
            assert drawing is not None
            panel = drawing.figure.axes[0]
            points = {(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in panel.lines}
            plt.close(drawing.figure)
        memory = max(float(value) for value in measured.runs.loc[runs.index, column]) / unit
        assert any(abs(x - memory) < 1e-9 and abs(y - fmean(each)) < 1e-9 for x, y in points)
        assert ("NVML" in panel.get_xlabel()) == on_card
