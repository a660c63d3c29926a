"""The history of steps drawn as a heat map: what is in the figure, and what cannot be drawn."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm, to_rgba
from step_records import LAYERS, record

from grass import heatmap
from grass.heatmap import plot
from grass.trace import History, Record, write_history


def run() -> list[Record]:
    """Two probing steps, then periods of 5 steps of layers (1, 3), (1, 2) and (0, 2); importance changes with each."""
    probing = [
        record(step, active=(), importance=None, age=None, norm=(0.1, 0.2, 0.3, 0.4), probability=(0.25,) * 4)
        for step in range(2)
    ]
    periods = (((1, 3), (0.1, 0.2, 0.3, 0.4)), ((1, 2), (0.1, 0.9, 0.3, 0.5)), ((0, 2), (0.1, 0.8, 0.2, 0.5)))
    training = [
        record(
            2 + 5 * number + i,
            active=active,
            importance=importance,
            age=(5 * number + i,) * 4,
            norm=tuple(0.01 * (i + 1) if layer in active else None for layer in range(4)),
        )
        for number, (active, importance) in enumerate(periods)
        for i in range(5)
    ]
    return probing + training


def cells(ax: Any) -> tuple[Any, list[float]]:
    """Masked values of the mesh, shape (layers, columns), and the steps at its edges."""
    mesh = ax.collections[0]
    edges = mesh.get_coordinates()
    assert edges[:, 0, 1].tolist() == [-0.5, 0.5, 1.5, 2.5, 3.5]
    return mesh.get_array().reshape(LAYERS, -1), edges[0, :, 0].tolist()


def colour_of(ax: Any, layer: int, column: int) -> tuple[float, ...]:
    mesh = ax.collections[0]
    return tuple(mesh.to_rgba(mesh.get_array().reshape(LAYERS, -1))[layer, column].tolist())


def legend_of(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_the_map_has_steps_to_the_right_and_layers_upward() -> None:
    ax, bar = plot(run(), title="a run").axes
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 17), (-0.5, 3.5))
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("step", "decoder layer", "a run")
    assert all(tick == int(tick) for axis in (ax.xaxis, ax.yaxis) for tick in axis.get_majorticklocs())
    assert bar.get_ylabel() == "mean gradient norm\n(RMS of gradient entries)"


def test_columns_are_the_periods_and_cells_their_importance() -> None:
    values, edges = cells(plot(run()).axes[0])
    assert edges == [0, 2, 7, 12, 17]
    assert values.mask[:, 0].all()
    assert values[:, 1:].T.tolist() == [[0.1, 0.2, 0.3, 0.4], [0.1, 0.9, 0.3, 0.5], [0.1, 0.8, 0.2, 0.5]]


def test_every_stretch_in_which_a_layer_trains_has_one_bar() -> None:
    ax = plot(run()).axes[0]
    spans = [(0, 12, 17), (1, 2, 12), (2, 7, 17), (3, 2, 7)]
    expected = [[[first, layer], [last, layer]] for layer, first, last in spans]
    edge, bar = ax.collections[1:]
    assert [s.tolist() for s in edge.get_segments()] == [s.tolist() for s in bar.get_segments()] == expected
    # white on black, so that one of the two stands out on any colour
    assert (tuple(edge.get_color()[0]), tuple(bar.get_color()[0])) == (to_rgba("black"), to_rgba("white"))
    assert edge.get_linewidth()[0] > bar.get_linewidth()[0]
    assert "layer trains in these steps" in legend_of(ax)


def test_what_was_not_measured_is_grey_and_the_legend_says_so() -> None:
    ax = plot(run(), value="norm").axes[0]
    values, edges = cells(ax)
    # equal in both probing steps, different in every other
    assert edges == [0, *range(2, 18)]
    assert values[:, 0].tolist() == [0.1, 0.2, 0.3, 0.4]
    assert values[:, 1].tolist() == [None, 0.01, None, 0.01]
    assert values.count() == 4 + 15 * 2
    assert ax.get_facecolor() == to_rgba("#e5e5e5")
    # a masked cell is left out, and the grey of the axes shows
    assert colour_of(ax, 0, 1)[3] == 0
    assert legend_of(ax) == ["layer trains in these steps", "not measured (layer asleep)"]
    assert legend_of(plot(run()).axes[0])[1] == "not measured yet (probing)"
    assert legend_of(plot(run(), value="probability").axes[0]) == ["layer trains in these steps"]


def test_a_norm_that_is_not_finite_has_a_colour_of_its_own() -> None:
    history = run()
    history[3] = replace(history[3], norm=(None, math.nan, None, math.inf))
    history[4] = replace(history[4], norm=(None, 0.0, None, 0.01))
    ax = plot(history, value="norm").axes[0]
    assert colour_of(ax, 1, 2) == colour_of(ax, 3, 2) == to_rgba("#ff00ff")
    assert legend_of(ax)[2] == "not a finite number"
    # zero is a measurement too: lowest colour, although the scale is logarithmic
    assert isinstance(ax.collections[0].norm, LogNorm)
    assert colour_of(ax, 1, 3) == colormaps["cividis"](0)
    assert colour_of(ax, 3, 3) == colormaps["cividis"](0)


def test_the_scale_is_logarithmic_where_norms_spread_and_never_for_probabilities() -> None:
    wide = [record(importance=(1e-6, 1e-5, 1e-4, 1e-3), probability=(1e-6, 1e-5, 1e-4, 1 - 1.11e-4))]
    norm = plot(wide).axes[0].collections[0].norm
    assert isinstance(norm, LogNorm)
    assert (norm.vmin, norm.vmax) == (1e-6, 1e-3)
    assert not isinstance(plot(wide, value="probability").axes[0].collections[0].norm, LogNorm)
    even = plot([record(importance=(0.1,) * 4)]).axes[0].collections[0].norm
    assert (even.vmin, even.vmax) == (pytest.approx(0.095), pytest.approx(0.105))


def test_age_is_counted_from_zero_in_steps() -> None:
    ax, bar = plot(run(), value="age").axes
    norm = ax.collections[0].norm
    assert (norm.vmin, norm.vmax) == (0, 14)
    assert bar.get_ylabel() == "steps since measured"
    assert cells(ax)[0][0, 1:].tolist() == list(range(15))


def test_a_history_a_list_and_a_file_give_the_same_map(tmp_path: Path) -> None:
    history = History()
    for step in range(3):
        history.append(record(step), torch.tensor([0.5, step + 1.0]))
    write_history(history, tmp_path / "history.jsonl")
    for same in (history, list(history), tmp_path / "history.jsonl", str(tmp_path / "history.jsonl")):
        values, _ = cells(plot(same, value="norm").axes[0])
        assert values[[1, 3]].tolist() == [[0.5, 0.5, 0.5], [1, 2, 3]]


def test_a_record_holds_until_the_next_one() -> None:
    thinned = [r for r in run() if r.step % 6 == 0]
    ax = plot(thinned).axes[0]
    assert cells(ax)[1] == [0, 6, 12, 13]
    assert ax.collections[1].get_segments()[-1].tolist() == [[6, 3], [12, 3]]


def test_thousands_of_steps_are_three_artists() -> None:
    layers, period = 32, 50
    generator = np.random.default_rng(0)
    history = []
    for step in range(20_000):
        if step % period == 0:
            active = tuple(sorted(generator.choice(layers, 4, replace=False).tolist()))
            importance = tuple(generator.random(layers).tolist())
        history.append(record(step, active=active, importance=importance, probability=(1 / layers,) * layers))
    ax = plot(history).axes[0]
    assert len(ax.collections) == 3
    assert not ax.patches
    assert ax.collections[0].get_array().shape == (layers, 20_000 // period)
    assert len(ax.collections[1].get_segments()) <= 4 * 20_000 // period


def test_it_draws_on_given_axes_and_otherwise_leaves_pyplot_alone() -> None:
    plot(run())
    assert not plt.get_fignums()
    figure, (left, right) = plt.subplots(1, 2, layout="constrained")
    assert plot(run(), ax=right) is figure
    assert (len(left.collections), len(right.collections)) == (0, 3)
    plt.close(figure)


def test_what_cannot_be_drawn_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="value must be one of importance, probability, norm, age, not 'loss'"):
        plot(run(), value="loss")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="history is empty"):
        plot(History())
    uniform = [replace(r, importance=None, age=None, norm=(None,) * 4) for r in run()]
    for value in ("importance", "age", "norm"):
        with pytest.raises(ValueError, match=f"value='{value}' was not measured in any step of this history"):
            plot(uniform, value=value)  # type: ignore[arg-type]
    assert plot(uniform, value="probability").axes
    with pytest.raises(ValueError, match="ascending steps, but step 0 follows step 16"):
        plot(run() + run())
    with pytest.raises(ValueError, match="its records have 2 and 4 layers"):
        plot([record(0), record(1, probability=(0.5, 0.5))])
    (tmp_path / "history.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"history\.jsonl, line 1: missing field"):
        plot(tmp_path / "history.jsonl")


def test_matplotlib_is_needed_to_draw_but_not_to_import(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    specification = importlib.util.spec_from_file_location("fresh", heatmap.__file__)
    assert specification is not None
    assert specification.loader is not None
    fresh = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(fresh)
    with pytest.raises(ImportError, match=r"^grass\.heatmap\.plot needs matplotlib: pip install matplotlib$"):
        fresh.plot(run())
