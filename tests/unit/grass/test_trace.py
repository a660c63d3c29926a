"""The history of steps: read late and together, kept in a file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from step_records import LAYERS, record
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from grass.trace import MOST_PENDING, History, Record, read_history, write_history


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
