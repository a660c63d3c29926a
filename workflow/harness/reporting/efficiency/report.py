"""The report of an efficiency study, from records and forecasts: tables, figures, and a list of what is missing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.efficiency.spec import EfficiencyStudy
from harness.efficiency.store import Store
from harness.records import atomic
from harness.reporting.efficiency.length_figure import memory_by_length
from harness.reporting.efficiency.memory_figures import memory_stack
from harness.reporting.efficiency.memory_table import memory_table
from harness.reporting.efficiency.peers_table import write_peers
from harness.reporting.efficiency.published_table import published_table
from harness.reporting.efficiency.rows import Rows, read_rows
from harness.reporting.efficiency.speed_figures import is_timed, speed_and_memory, speeds_by_corner, throughput_bars
from harness.reporting.efficiency.speed_tables import offload_table, rehearsal_table, throughput_table
from harness.reporting.efficiency.targets import target_table
from harness.reporting.published import Published
from harness.reporting.style import Drawing, save, styled


def write_report(study: EfficiencyStudy, store: Store, published: Published) -> list[str]:
    """Write tables and figures from whatever is on disk; returns the names of the figures."""
    rows = read_rows(study, store)
    tables = [memory_table(rows), throughput_table(rows), offload_table(rows), target_table(rows)]
    if study.published is not None:
        tables.append(published_table(rows, study.published, published))
    if any(row.rehearsed is not None for row in rows):
        tables.append(rehearsal_table(rows))
    for table in tables:
        table.write(store.folder / "tables")
    write_peers(store.folder / "peers")
    captions = {}
    with styled():
        for drawing in draw(rows, published):
            save(drawing, store.folder / "figures")
            captions[drawing.name] = drawing.texts(None if study.published is None else study.published.figures)
    atomic.write_json(store.folder / "figures.json", captions)
    _remove_others(store.folder / "figures", {f"{name}.{suffix}" for name in captions for suffix in ("svg", "png")})
    return list(captions)


def draw(rows: Rows, published: Published) -> Iterator[Drawing]:
    """Every figure for which there is data, one at a time."""
    known = [row for row in rows if row.peak("forecast") is not None or row.peak("measured") is not None]
    for model in dict.fromkeys(row.named.model for row in known):
        if rows.in_corners(model):
            yield memory_stack(rows, model)
        shapes = {row.entry.cell.shape for row in known if row.named.model == model}
        if len([shape for shape in shapes if shape.batch == 1]) > 1:
            yield memory_by_length(rows, model, published)
        if is_timed(rows, model):
            yield throughput_bars(rows, model)
        if speeds_by_corner(rows, model):
            yield speed_and_memory(rows, model)


def _remove_others(folder: Path, keep: Sequence[str] | set[str]) -> None:
    """Remove figures of an earlier report for which there is no data any more."""
    for path in folder.glob("*.*"):
        if path.name not in keep and path.suffix in (".svg", ".png"):
            path.unlink()
