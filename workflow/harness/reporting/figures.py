"""All figures of a study, drawn and written together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from harness.records.atomic import whole_folder, write_json
from harness.reporting.frames import Frames, refuse_link
from harness.reporting.importance_figures import agreement_curves, importance_map, layerwise_methods
from harness.reporting.layout import part, trained
from harness.reporting.memory_figures import accuracy_and_memory
from harness.reporting.probe_figures import drift_curves, probe_figures
from harness.reporting.result_figures import efficiency_bars, result_cells, result_dots
from harness.reporting.style import Drawing, save, styled
from harness.reporting.training_figures import loss_curves, rate_curves
from harness.study.spec import Study


def draw(frames: Frames, study: Study) -> Iterator[Drawing]:
    """Every figure, one at a time, in the order of the page.

    If a study defines comparisons, figures with a line per method are drawn once for each comparison: dozens of lines
    in one figure would be unreadable.
    """
    for model in study.models:
        yield from probe_figures(frames, study, model)
        if not trained(study):
            continue  # the other figures compare trained methods
        if not study.comparisons:
            yield from _lines(frames, study, model)
        for label, comparison in study.comparisons.items():
            for drawing in _lines(frames, part(study, label), model):
                caption = f"{comparison.title}. {drawing.caption}"
                yield replace(drawing, name=f"{drawing.name}--{label}", caption=caption)
        for method in layerwise_methods(frames, study, model):
            yield importance_map(frames, study, model, method)
        yield efficiency_bars(frames, study, model)


def _lines(frames: Frames, study: Study, model: str) -> Iterator[Drawing]:
    if result_cells(study):
        yield result_dots(frames, study, model)
    scatter = accuracy_and_memory(frames, study, model)
    if scatter is not None:
        yield scatter
    yield rate_curves(frames, study, model)
    yield loss_curves(frames, study, model)
    if layerwise_methods(frames, study, model):
        yield agreement_curves(frames, study, model)
    drift = drift_curves(frames, study, model)
    if drift is not None:
        yield drift


def write_figures(frames: Frames, study: Study, folder: Path) -> None:
    """Write every figure as svg and png, all or none; captions and other texts go to `<folder>.json` beside it."""
    refuse_link(folder)
    captions = {}
    with styled(), whole_folder(folder) as temporary:
        for drawing in draw(frames, study):
            save(drawing, temporary)
            captions[drawing.name] = drawing.texts(study.figures)
    write_json(folder.with_suffix(".json"), captions)
