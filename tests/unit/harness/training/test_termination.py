"""A run that is told to end saves after the step in progress, and goes on to the same weights."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.checking.tiny import LR, tiny_inputs, tiny_training
from harness.records import claim
from harness.records.code import Code
from harness.step import resume
from harness.study.jobs import SearchJob
from harness.study.spec import Search
from harness.training.loading import Inputs
from harness.training.loop import train
from harness.training.search import search
from harness.training.termination import Termination
from safetensors.torch import load_file

from baselines.full import Full

STEPS = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return tiny_inputs(tmp_path_factory.mktemp("inputs"))


def run(inputs: Inputs, folder: Path, *, steps: int = STEPS, lr: float = LR, seed: int = 0) -> Any:
    return train(
        tiny_training("full", {}, steps=steps), name="run", lr=lr, lr_searched=False, seed=seed, inputs=inputs,
        folder=folder, state_folder=folder / "state", checkpoint_every=100,
    )  # fmt: skip


def told_in_step(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """The process gets a signal in the middle of a step."""
    usual = Full.begin_step

    def signalled(self: Full, at: int) -> None:
        if at == step:
            os.kill(os.getpid(), number)
        usual(self, at)

    monkeypatch.setattr(Full, "begin_step", signalled)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_saves_after_the_step_and_goes_on_to_the_same_weights(
    number: signal.Signals,
    inputs: Inputs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(inputs, tmp_path / "straight")
    usual = signal.getsignal(number)
    with monkeypatch.context() as patch:
        told_in_step(patch, 3, number)
        with pytest.raises(SystemExit) as ended:
            run(inputs, tmp_path / "stopped")
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) is usual
    assert f"run, after step 4: stopped by {number.name}; the same command again goes on" in capsys.readouterr().err
    record = run(inputs, tmp_path / "stopped")
    assert "resumed after step 4" in record.notes
    straight, stopped = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("straight", "stopped"))
    assert all(torch.equal(straight[key], stopped[key]) for key in straight)


def test_a_trial_of_a_search_goes_on_as_well(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Search(grid=(1e-3, 2e-3, 4e-3), seeds=(7,), max_extensions=0)
    job = SearchJob(training=tiny_training("full", {}, steps=STEPS), search=grid)
    straight = search(job, inputs=inputs, trials_folder=tmp_path / "straight")
    with monkeypatch.context() as patch:
        told_in_step(patch, 3, signal.SIGTERM)
        with pytest.raises(SystemExit):
            search(job, inputs=inputs, trials_folder=tmp_path / "stopped")
    assert [path.name for path in resume.manifests(tmp_path / "stopped" / "lr0.001-seed7")] == ["step4.json"]
    again = search(job, inputs=inputs, trials_folder=tmp_path / "stopped")
    assert again.trials == straight.trials
    assert not [path for path in (tmp_path / "stopped").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("changed", "of"), [({"lr": 2 * LR}, "learning rate"), ({"seed": 1}, "seed"), ({"steps": STEPS + 1}, "spec")]
)
def test_a_state_goes_on_under_its_own_rate_seed_and_spec_alone(
    changed: dict[str, Any], of: str, inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        told_in_step(patch, 3, signal.SIGTERM)
        with pytest.raises(SystemExit):
            run(inputs, tmp_path)
    record = run(inputs, tmp_path, **changed)
    assert f"a resume state was dropped: it was made from another {of}" in record.notes
    assert record.steps_done == changed.get("steps", STEPS)


def test_a_state_of_other_code_is_dropped(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        told_in_step(patch, 3, signal.SIGTERM)
        patch.setattr(claim, "code_of", lambda roots: Code("0" * 64, {}))
        with pytest.raises(SystemExit):
            run(inputs, tmp_path)
    assert "a resume state was dropped: it was made from another code" in run(inputs, tmp_path).notes


def test_asked_twice_it_ends_at_once() -> None:
    with Termination() as termination:
        os.kill(os.getpid(), signal.SIGTERM)
        assert termination.asked == signal.SIGTERM
        with pytest.raises(SystemExit) as ended:
            os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM
