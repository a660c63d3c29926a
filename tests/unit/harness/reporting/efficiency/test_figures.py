"""Figures of memory and speed, read back through matplotlib, and the report as a whole."""

from __future__ import annotations

import json
from typing import Any

import efficiency_data as data
import matplotlib.pyplot as plt
import numpy as np
import pytest
from harness.efficiency.plan import cells, every_group
from harness.efficiency.spec import load_efficiency
from harness.efficiency.store import Store
from harness.reporting.efficiency.length_figure import memory_by_length
from harness.reporting.efficiency.memory_figures import FORECAST_ONLY, KINDS, memory_stack
from harness.reporting.efficiency.report import draw, write_report
from harness.reporting.efficiency.rows import read_rows
from harness.reporting.efficiency.speed_figures import pareto_front, speed_and_memory, throughput_bars
from harness.reporting.style import Drawing

MAIN = data.MAIN
PUBLISHED = data.published()
COMPARED = data.study().compared


def texts(drawing: Drawing) -> set[str]:
    found = {text.get_text() for panel in drawing.figure.axes for text in panel.texts}
    return found | {drawing.figure._suptitle.get_text()}


def test_forecasts_alone_draw_memory_and_a_bound_on_speed_and_say_that_nothing_was_measured(store: Store) -> None:
    data.forecast_methods(store, "plain", "1x1024")
    data.forecast_methods(store, "plain", "1x4096", more=5.0)
    drawings = list(draw(data.rows_of(store), PUBLISHED))
    assert [d.name for d in drawings] == [
        f"{name}--{MAIN}" for name in ("memory", "memory-by-length", "speed-and-memory")
    ]
    for drawing in drawings:
        assert drawing.figure._suptitle.get_text().endswith(("not measured on a GPU", f"({FORECAST_ONLY})"))
        assert "not measured on a GPU" in drawing.caption


def test_bars_of_memory_are_stacked_by_kind_with_a_diamond_at_what_was_measured(store: Store) -> None:
    data.forecast_methods(store, "plain", "1x1024")
    data.measure_methods(store, "plain", "1x1024")
    drawing = memory_stack(data.rows_of(store), MAIN)
    panel = drawing.figure.axes[0]
    assert [tick.get_text() for tick in panel.get_yticklabels()] == list(COMPARED)
    lora = [bar for bar in panel.patches if round(bar.get_y() + bar.get_height() / 2) == 0]
    assert [round(bar.get_width(), 2) for bar in lora] == [14.55, 4.85]  # kinds of no bytes have no bar
    assert lora[1].get_x() == pytest.approx(14.55)
    assert lora[0].get_hatch() != lora[1].get_hatch()
    diamonds = [line for line in panel.lines if line.get_marker() == "D"]
    assert [line.get_xdata()[0] for line in diamonds] == pytest.approx([1.02 * data.PEAKS[m] for m in COMPARED])
    assert "19.40  (measured 19.79)" in texts(drawing)
    assert f"{MAIN}: peak memory of a training step (bars forecast, diamonds measured)" in texts(drawing)
    assert data.CARD in drawing.caption
    legend = [text.get_text() for text in drawing.figure.legends[0].get_texts()]
    assert legend == [*KINDS, "measured"]


def test_memory_by_length_has_the_papers_points_only_under_its_settings(store: Store) -> None:
    for settings in ("plain", "lean"):
        data.forecast_methods(store, settings, "1x1024")
        data.forecast_methods(store, settings, "1x1792", more=4.0)
    drawing = memory_by_length(data.rows_of(store), MAIN, PUBLISHED)
    plain, lean = drawing.figure.axes
    assert (plain.get_title("left"), lean.get_title("left")) == ("plain", "lean")

    def stars(panel: Any) -> list[tuple[float, float]]:
        return sorted((line.get_xdata()[0], line.get_ydata()[0]) for line in panel.lines if line.get_marker() == "*")

    assert stars(lean) == []
    assert (1792, 23.25) in stars(plain)
    assert (1792, 24.0) in stars(plain)
    assert (1024, 19.08) in stars(plain)
    lines = [line for line in plain.lines if line.get_marker() == "s"]  # the second method: grass
    assert list(np.asarray(lines[0].get_ydata())) == pytest.approx([17.4, 21.4])
    assert {"full: 50 to 54 GiB, beyond the axis", "lisa-keep: 42 to 46 GiB, beyond the axis"} <= texts(drawing)


def test_throughput_bars_show_every_repeat(store: Store) -> None:
    data.measure_methods(store, "lean", "4x1024")
    drawing = throughput_bars(data.rows_of(store), MAIN)
    (panel,) = drawing.figure.axes
    dots = {line.get_ydata()[0]: list(line.get_xdata()) for line in panel.lines}
    assert dots[0] == pytest.approx([1000.0, 990.0, 980.0])
    widths = [bar.get_width() for bar in panel.patches]
    assert widths == pytest.approx([data.SPEEDS[m] * 0.99 for m in COMPARED])
    assert f"{MAIN}: speed of a training step, measured on {data.CARD}" in texts(drawing)


def test_a_method_without_time_says_why(store: Store) -> None:
    data.measure_methods(store, "lean", "4x1024")
    full = data.entry(MAIN, "full", "lean", "4x1024")
    store.keep(data.cell_record(full, status="oom", status_why="no memory"))
    assert "  oom" in texts(throughput_bars(data.rows_of(store), MAIN))


def test_speed_against_memory_joins_the_unbeaten_methods(store: Store) -> None:
    data.measure_methods(store, "lean", "4x1024")
    drawing = speed_and_memory(data.rows_of(store), MAIN)
    (panel,) = drawing.figure.axes
    points = {
        line.get_label(): (line.get_xdata()[0], line.get_ydata()[0])
        for line in panel.lines
        if len(line.get_xdata()) == 1
    }
    assert points["grass-decoder"] == (pytest.approx(1.02 * 17.0), pytest.approx(1250 * 0.99))
    assert pareto_front([(2.0, 5.0), (1.0, 3.0), (3.0, 4.0), (2.0, 4.0)]) == [(1.0, 3.0), (2.0, 5.0)]


def test_without_a_gpu_speed_is_a_bound_to_loras(store: Store) -> None:
    for method, bound in (("lora", 1000.0), ("grass-decoder", 1250.0)):
        of = data.entry(MAIN, method, "plain", "1x1024")
        store.keep(data.forecast_record(of, data.PEAKS[method], bound_tokens_per_s=bound))
    (panel,) = speed_and_memory(data.rows_of(store), MAIN).figure.axes
    points = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in panel.lines[1:]}
    assert points == {"lora": (pytest.approx(19.4), 1.0), "grass-decoder": (pytest.approx(17.0), 1.25)}
    assert "bound" in panel.get_ylabel()


def test_a_report_repeats_byte_for_byte_and_drops_figures_of_the_past(store: Store) -> None:
    data.forecast_methods(store, "plain", "1x1024")
    data.measure_methods(store, "plain", "1x1024")
    old = store.folder / "figures" / "memory--gone.svg"
    old.parent.mkdir(parents=True)
    old.write_text("", encoding="utf-8")
    names = write_report(data.study(), store, PUBLISHED)
    first = {p.name: p.read_bytes() for p in store.folder.glob("[tf]*/*")}
    assert not old.exists()
    assert {f"{name}.{suffix}" for name in names for suffix in ("svg", "png")} < first.keys()
    assert {"memory.csv", "memory.md", "throughput.md", "offload.md", "targets.md", "published.md"} < first.keys()
    captions = json.loads((store.folder / "figures.json").read_text(encoding="utf-8"))
    assert list(captions) == names
    write_report(data.study(), store, PUBLISHED)
    assert first == {p.name: p.read_bytes() for p in store.folder.glob("[tf]*/*")}
    assert not plt.get_fignums()


def test_a_study_without_the_papers_labels_has_no_table_of_them(store: Store) -> None:
    line = next(line for line in data.TINY.splitlines(keepends=True) if line.startswith("published:"))
    study = load_efficiency(data.tiny_file(store.folder, (line, ""), ("batch: 2", "batch: 1")))
    for e in cells(every_group(study)):
        store.keep(data.forecast_record(e, 1.0))
    write_report(study, store, PUBLISHED)
    assert {p.stem for p in store.folder.glob("tables/*.md")} == {"memory", "throughput", "offload", "targets"}
    longer = memory_by_length(read_rows(study, store), "tiny", PUBLISHED)
    assert "published" not in [text.get_text() for text in longer.figure.legends[0].get_texts()]


def test_a_model_that_is_known_outside_the_corners_alone_has_no_figure_of_them(store: Store) -> None:
    of = data.entry(data.MAIN, "full", "plain", "4x1024")
    store.keep(data.forecast_record(of, 60.0))
    store.keep(data.cell_record(of, 60.0, (500.0,)))
    assert list(draw(data.rows_of(store), PUBLISHED)) == []


def test_without_the_reference_there_is_no_bound_to_draw(store: Store) -> None:
    of = data.entry(data.MAIN, "grass", "plain", "1x1024")
    store.keep(data.forecast_record(of, 17.0))
    assert [drawing.name for drawing in draw(data.rows_of(store), PUBLISHED)] == [f"memory--{MAIN}"]
