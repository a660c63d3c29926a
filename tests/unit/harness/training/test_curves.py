"""Curves are drawn between steps, change no bit of a run, and are refused before work where they cannot be drawn."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from harness.checking.tiny import LR, tiny_inputs, tiny_training
from harness.errors import UserError
from harness.measuring.clock import StepClock
from harness.records.run import TrainRecord
from harness.study import curves as asked
from harness.training import curves
from harness.training.loading import Inputs
from harness.training.loop import train
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return tiny_inputs(tmp_path_factory.mktemp("inputs"))


def run(inputs: Inputs, folder: Path | None) -> TrainRecord:
    return train(
        tiny_training("full", {}, steps=5), name="run", lr=LR, lr_searched=False, seed=0, inputs=inputs, folder=folder
    )


class Writer:
    """Stands in for TensorBoard's writer, and notes whether a step was being timed."""

    made: list[Writer]
    in_step = False
    fails = False

    def __init__(self, folder: Path, **_: Any) -> None:
        self.folder, self.points, self.flushed, self.closed = folder, {}, 0, False  # type: ignore[var-annotated]
        Writer.made.append(self)

    def _call(self) -> None:
        assert not Writer.in_step, "called on a step's clock"
        if Writer.fails:
            raise OSError(28, "No space left on device")

    def add_scalar(self, key: str, value: float, step: int, walltime: float) -> None:
        self._call()
        self.points.setdefault(key, {})[step] = value

    def flush(self) -> None:
        self._call()
        self.flushed += 1

    def close(self) -> None:
        self._call()
        self.closed = True


def installed(monkeypatch: pytest.MonkeyPatch, where: str | None) -> None:
    """Whether curves find TensorBoard; all others find what there is."""
    found = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: where))
    monkeypatch.setattr(asked, "importlib", found)


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of curves that are asked for, with a TensorBoard that is installed."""
    Writer.made, Writer.in_step, Writer.fails = [], False, False
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    installed(monkeypatch, "somewhere")
    monkeypatch.setenv(asked.FOLDER, str(tmp_path / "curves"))
    monkeypatch.setattr(curves, "EVERY_S", 0.0)
    start, stop = StepClock.start, StepClock.stop

    def started(clock: StepClock) -> None:
        Writer.in_step = True
        start(clock)

    def stopped(clock: StepClock) -> float:
        seconds = stop(clock)
        Writer.in_step = False
        return seconds

    monkeypatch.setattr(StepClock, "start", started)
    monkeypatch.setattr(StepClock, "stop", stopped)
    return tmp_path / "curves"


def test_a_run_has_all_its_steps_drawn_off_the_clock(drawn: Path, inputs: Inputs, tmp_path: Path) -> None:
    record = run(inputs, tmp_path / "run")
    assert record.status == "ok", record.status_why
    (writer,) = Writer.made
    assert writer.folder == drawn / "run"
    assert writer.flushed >= 5
    assert writer.closed
    assert {"train/loss", "train/lr_factor", "train/step_s", "train/tokens_per_s"} <= set(writer.points)
    assert all(list(points) == list(range(5)) for points in writer.points.values())


def test_it_is_the_same_run(drawn: Path, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(inputs, tmp_path / "with")
    monkeypatch.delenv(asked.FOLDER)
    run(inputs, tmp_path / "without")
    assert len(Writer.made) == 1
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("with", "without"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_trials_of_a_search_are_not_drawn(drawn: Path, inputs: Inputs) -> None:
    run(inputs, None)
    assert Writer.made == []


def test_a_full_disk_ends_the_curves_alone(
    drawn: Path, inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Writer.fails = True
    assert run(inputs, tmp_path / "run").status == "ok"
    assert capsys.readouterr().err.count("warning: no curves any more") == 1


def test_what_is_not_installed_is_said_before_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed(monkeypatch, None)
    assert asked.wanted() is None
    monkeypatch.setenv(asked.FOLDER, str(tmp_path))
    with pytest.raises(UserError, match="the package tensorboard is not installed: pip install tensorboard"):
        asked.wanted()


def test_tensorboard_reads_what_is_written(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv(asked.FOLDER, str(tmp_path / "curves"))
    run(inputs, tmp_path / "run")
    events = accumulator.EventAccumulator(str(tmp_path / "curves" / "run")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(5))
