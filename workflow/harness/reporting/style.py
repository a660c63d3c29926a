"""Style of the figures, and how they are saved: the same data give the same bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from harness.records.atomic import whole_file
from harness.reporting.layout import trained
from harness.reporting.page_parts import FigureTexts
from harness.study.spec import Study

WIDTH = 7.2
"""Inches: a printed page between its margins, so that 8 points are 8 points."""

SEEDS_DRAWN = 20
"""Of each method, in figures with a line a seed: more make them neither readable nor quick."""

# Okabe and Ito's colours, told apart under every common colour blindness; grey in place of yellow, faint on white.
_COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8A8A8A")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (3, 1, 1, 1, 1, 1)))

_RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.labelsize": 8.5,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "grass-bench",
    "savefig.dpi": 160,
}


def a_line_a_seed(study: Study) -> str:
    """What a caption says of such lines."""
    return (
        "one line a seed"
        if len(study.seeds) <= SEEDS_DRAWN
        else f"one line a seed, the first {SEEDS_DRAWN} of each method"
    )


@dataclass(frozen=True, kw_only=True)
class Look:
    """Colour, marker and line style of one method; the same in every figure of a study."""

    colour: str
    marker: str
    line: Any


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A finished figure with its caption."""

    name: str
    caption: str
    alt: str
    figure: Any

    def texts(self, papers: Mapping[Any, str] | None = None) -> dict[str, str]:
        """What the page needs beside the picture; `papers` has, by kind, the paper's figure that it measures anew."""
        anew = (papers or {}).get(self.name.partition("--")[0])
        caption = self.caption if anew is None else f"{anew} of the paper, measured anew. {self.caption}"
        return FigureTexts(caption=caption, alt=self.alt).model_dump()


def looks(study: Study) -> dict[str, Look]:
    """One look a method, in the order of the config; marker and line differ too, so that colour is never needed."""
    untrained = [method for method in study.methods if method not in trained(study)]
    return looks_of(trained(study) + untrained)


def looks_of(methods: Iterable[str]) -> dict[str, Look]:
    """One look a method, by its place."""
    return {
        method: Look(
            colour=_COLOURS[i % len(_COLOURS)],
            marker=_MARKERS[(i + i // len(_COLOURS)) % len(_MARKERS)],
            line=_LINES[(i + i // len(_COLOURS)) % len(_LINES)],
        )
        for i, method in enumerate(methods)
    }


@contextmanager
def styled() -> Iterator[None]:
    """Draw and save inside this block."""
    with plt.rc_context(_RC):
        yield


def grid(rows: int, columns: int, *, height: float, **options: Any) -> tuple[Any, Any]:
    """A figure of page width and its axes, always as a 2-d array."""
    figure, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), squeeze=False, **options)
    return figure, axes


def legend_below(figure: Any, handles: list[Any], labels: list[str]) -> None:
    """One legend for the whole figure, below it, so that it covers no data."""
    if handles:
        rows = -(-len(handles) // 6)
        columns = -(-len(handles) // rows)
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3.2)


def empty(axes: Any, text: str) -> None:
    """Say in the panel why it is empty."""
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="#555555", wrap=True)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)


def save(drawing: Drawing, folder: Path) -> None:
    """Write `<name>.svg` and `<name>.png` without dates, and close the figure."""
    for suffix, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
        with whole_file(folder / f"{drawing.name}.{suffix}") as temporary:
            drawing.figure.savefig(temporary, format=suffix, metadata=metadata)
        # where everything stands is worked out once, which takes a third of the time, and is the same in both
        drawing.figure.set_layout_engine("none")
    plt.close(drawing.figure)
