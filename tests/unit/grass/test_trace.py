"""The history of steps: read late and together, kept in a file, drawn as a heat map."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.colors import LogNorm, to_rgba
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from grass import heatmap
from grass.heatmap import plot
from grass.trace import MOST_PENDING, History, Record, read_history, write_history

LAYERS = 4


def record(step: int = 0, **fields_of: Any) -> Record:
    """A step in which layers 1 and 3 train."""
    chosen: dict[str, Any] = {
        "step": step,
        "active": (1, 3),
        "norm": (None,) * LAYERS,
        "importance": (0.1, 0.2, 0.3, 0.4),
        "age": (0, 1, 2, 3),
        "probability": (0.1, 0.2, 0.3, 0.4),
        "effective_layers": 3.6,
        "mode": "resident",
        "moved_bytes": 0,
        "exposed_copy_s": None,
        **fields_of,
    }
    return Record(**chosen)


class Watched(Tensor):
    """A tensor that notes what is done with it, and with what is made of it."""

    done: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # an attribute is reported as the getter of its descriptor
        name = func.__name__
        cls.done.append(func.__self__.__name__ if name == "__get__" else name)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture
def watched() -> Iterator[list[str]]:
    Watched.done.clear()
    yield Watched.done
    Watched.done.clear()


def norms(*values: float) -> Tensor:
    return torch.tensor(values).as_subclass(Watched)


# ------------------------------------------------------------ reading late


def test_append_len_and_repr_look_at_no_value(watched: list[str]) -> None:
    history = History()
    for step in range(MOST_PENDING - 1):
        history.append(record(step), norms(0.5, 0.25), lambda: pytest.fail("asked for a time"))
    assert len(history) == MOST_PENDING - 1
    assert repr(history) == f"History({MOST_PENDING - 1} steps)"
    assert set(watched) <= {"shape", "is_meta", "detach"}


def test_reading_one_record_reads_all_that_are_pending_at_once_and_only_once(watched: list[str]) -> None:
    history = History()
    for step in range(5):
        history.append(record(step), norms(0.5, step))
    assert history[2].norm == (None, 0.5, None, 2.0)
    assert (watched.count("cat"), watched.count("tolist")) == (1, 1)
    assert [r.norm[3] for r in history] == [0, 1, 2, 3, 4]
    assert watched.count("tolist") == 1


def test_a_record_that_was_read_does_not_wait_for_later_ones(watched: list[str]) -> None:
    history = History()
    history.append(record(0), norms(1, 2))
    assert history[0].norm == (None, 1, None, 2)
    history.append(record(1), norms(3, 4))
    assert [history[0].step, history[-2].step, *(r.step for r in history[:1])] == [0, 0, 0]
    assert watched.count("tolist") == 1
    assert history[-1].norm == (None, 3, None, 4)
    assert watched.count("tolist") == 2


def test_when_256_are_pending_they_are_read_with_one_transfer(watched: list[str]) -> None:
    history = History()
    asked = []
    for step in range(600):
        history.append(record(step), norms(step, -step), lambda step=step: asked.append(step))
        assert watched.count("tolist") == (step + 1) // 256
    assert asked == list(range(512))
    assert [r.norm for r in history] == [(None, float(s), None, float(-s)) for s in range(600)]
    assert asked == list(range(600))
    assert watched.count("tolist") == 3


def test_norms_belong_to_active_layers_or_while_probing_to_all() -> None:
    history = History()
    history.append(record(0, active=(), importance=None, age=None), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    history.append(record(1, active=(0, 2)), torch.tensor([5.0, 6.0]))
    history.append(record(2))
    assert [r.norm for r in history] == [(1, 2, 3, 4), (5, None, 6, None), (None,) * 4]


def test_the_time_of_copies_is_asked_for_once_and_may_be_unknown() -> None:
    asked = []

    def exposed() -> float:
        asked.append("once")
        return 0.125

    history = History()
    history.append(record(0), None, exposed)
    history.append(record(1), torch.ones(2), lambda: None)
    assert not asked
    assert [r.exposed_copy_s for r in history] == [0.125, None]
    assert [r.exposed_copy_s for r in history] == [0.125, None]
    assert asked == ["once"]


def test_a_history_reads_like_a_list() -> None:
    history = History()
    assert history == []
    for step in range(4):
        history.append(record(step), torch.ones(2))
    expected = [record(step, norm=(None, 1.0, None, 1.0)) for step in range(4)]
    assert history == expected
    assert expected == history
    assert history != expected[:3]
    assert history != "another thing"
    assert history[1:3] == expected[1:3]
    assert type(history[1:3]) is list
    assert history[-1] == expected[-1]
    assert list(reversed(history)) == expected[::-1]
    assert expected[2] in history
    with pytest.raises(IndexError):
        history[4]


def test_norms_that_fit_no_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"norms of step 7 must have shape \(2,\), one value for .* not \(3,\)"):
        History().append(record(7), torch.ones(3))


def test_tensors_without_values_leave_none_and_never_break() -> None:
    history = History()
    with FakeTensorMode():
        fake = torch.ones(2)
        for step in range(300):
            history.append(record(step), fake, lambda: pytest.fail("asked for a time"))
        assert len(history) == 300
    history.append(record(300), torch.ones(2, device="meta"))
    history.append(record(301), torch.ones(2))
    assert history[:301] == [record(step) for step in range(301)]
    assert history[301].norm == (None, 1.0, None, 1.0)


def test_a_pending_norm_keeps_no_graph_alive() -> None:
    history = History()
    history.append(record(0), torch.ones(2, requires_grad=True) * 2)
    assert all(p.norms is not None and p.norms.grad_fn is None for p in history._pending.values())
    assert history[0].norm == (None, 2.0, None, 2.0)


# ------------------------------------------------------------ the file


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    history = History()
    history.append(record(0, active=(), importance=None, age=None), torch.rand(LAYERS))
    history.append(record(1, mode="move", moved_bytes=2**40, effective_layers=1 / 3), torch.rand(2), lambda: 1e-5)
    history.append(record(2, importance=(5e-324, 1e308, 0.1 + 0.2, 0.0)))
    write_history(history, tmp_path / "history.jsonl")
    assert read_history(tmp_path / "history.jsonl") == history
    assert read_history(str(tmp_path / "history.jsonl")) == list(history)
    lines = (tmp_path / "history.jsonl").read_text(encoding="utf-8").splitlines()
    assert [list(json.loads(line)) for line in lines] == [[f.name for f in fields(Record)]] * 3


def test_an_empty_history_gives_an_empty_file(tmp_path: Path) -> None:
    write_history(History(), tmp_path / "history.jsonl")
    assert (tmp_path / "history.jsonl").read_bytes() == b""
    assert read_history(tmp_path / "history.jsonl") == []


def test_numbers_that_json_lacks_survive_in_strict_json(tmp_path: Path) -> None:
    broken = record(norm=(math.nan, math.inf, None, -math.inf), effective_layers=math.nan)
    write_history([broken], tmp_path / "history.jsonl")
    text = (tmp_path / "history.jsonl").read_text(encoding="utf-8")
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not strict JSON"))
    assert row["norm"] == ["NaN", "Infinity", None, "-Infinity"]
    # NaN is not equal to itself, its text is
    assert repr(read_history(tmp_path / "history.jsonl")) == repr([broken])


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    write_history([record(0)], path)
    with pytest.raises(TypeError):
        write_history([record(1), record(2, mode=object())], path)
    assert read_history(path) == [record(0)]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"step": 1.5}, "step: 1.5 is not a whole number"),
        ({"step": True}, "step: true is not a whole number"),
        ({"active": 3}, "active: 3 is not a list"),
        ({"active": [4]}, r"active names a layer that is not from 0 to 3: \[4\]"),
        ({"norm": [None, "much", None, None]}, 'norm: "much" is not a number'),
        ({"norm": [None]}, "norm has 1 entries, but probability has 4"),
        ({"age": [0, 1]}, "age has 2 entries, but probability has 4"),
        ({"probability": None}, "probability: null is not a list"),
        ({"probability": [0.1, None, 0.3, 0.4]}, "probability: null is not a number"),
        ({"effective_layers": False}, "effective_layers: false is not a number"),
        ({"exposed_copy_s": 10**400}, "exposed_copy_s: int too large"),
        ({"mode": None}, "mode: null is not a string"),
        ({"colour": "red"}, "unknown field colour"),
    ],
)
def test_a_bad_field_is_named_with_its_file_and_line(tmp_path: Path, change: dict[str, Any], what: str) -> None:
    path = tmp_path / "history.jsonl"
    write_history([record(0), record(1)], path)
    good = path.read_text(encoding="utf-8")
    path.write_text(good + json.dumps({**json.loads(good.splitlines()[0]), **change}) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"history\.jsonl, line 3: {what}"):
        read_history(path)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"step": 1, "act', "not JSON .* at column"),
        (b"", "not JSON"),
        (b"[1, 2]", "a record is a JSON object"),
        (b'{"step": NaN}', 'NaN is not JSON; write it as the string "NaN"'),
        (b'{"step": 1}', "missing field active, age"),
        (b'{"step": "\xff"}', "'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: bytes, what: str) -> None:
    path = tmp_path / "history.jsonl"
    write_history([record(0)], path)
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(ValueError, match=rf"history\.jsonl, line 2: {what}"):
        read_history(path)


# ------------------------------------------------------------ the figure


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
