"""The last two resume states are kept, and one that is not what was written is never used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from further import a_few
from harness.checking.tiny import LR, tiny_inputs, tiny_training
from harness.records.run import TrainRecord
from harness.step import resume
from harness.study.spec import Observation
from harness.training.loading import Inputs
from harness.training.loop import train
from safetensors.torch import load_file

from baselines.full import Full

STEPS = 8
OPTIONS = {"lora": {"rank": 2, "alpha": 4}}


class KilledError(Exception):
    """Stands for a killed process."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return tiny_inputs(tmp_path_factory.mktemp("inputs"))


def run(inputs: Inputs, folder: Path, method: str = "full", **changed: Any) -> TrainRecord:
    return train(
        tiny_training(method, OPTIONS.get(method, {}), steps=STEPS), name="run", lr_searched=False, seed=0,
        inputs=inputs, folder=folder, state_folder=folder / "state", checkpoint_every=2, **{"lr": LR, **changed},
    )  # fmt: skip


@pytest.fixture
def killed(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run that ended in its eighth step, with states after the fourth and the sixth."""
    with monkeypatch.context() as patch:
        usual = Full.begin_step

        def dies(self: Full, step: int) -> None:
            if step == STEPS - 1:
                raise KilledError
            usual(self, step)

        patch.setattr(Full, "begin_step", dies)
        with pytest.raises(KilledError):
            run(inputs, tmp_path)
    assert [path.name for path in resume.manifests(tmp_path / "state")] == ["step6.json", "step4.json"]
    return tmp_path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def edit(path: Path) -> None:
    manifest = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(manifest | {"sha256": 7}))


TEARS = {"cut": cut, "flip": flip, "gone": Path.unlink, "manifest": edit}


@pytest.mark.parametrize("tear", TEARS.values(), ids=TEARS)
def test_a_torn_state_is_named_and_the_one_before_is_used(
    tear: Callable[[Path], None], killed: Path, inputs: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    tear(killed / "state" / "step6.pt")
    record = run(inputs, killed)
    run(inputs, killed / "straight")
    assert "resumed after step 4" in record.notes
    assert any(f"the resume state {killed / 'state' / 'step6.pt'} " in note for note in record.notes)
    assert "run: warning: the resume state" in capsys.readouterr().err
    torn, straight = (load_file(folder / "model" / "model.safetensors") for folder in (killed, killed / "straight"))
    assert all(torch.equal(torn[key], straight[key]) for key in straight)


def test_where_both_are_torn_the_run_begins_anew_and_says_so(killed: Path, inputs: Inputs) -> None:
    for step in (4, 6):
        cut(killed / "state" / f"step{step}.pt")
    record = run(inputs, killed)
    assert sum("is not what was written" in note for note in record.notes) == 2
    assert not any("resumed" in note for note in record.notes)
    assert (record.status, record.steps_done) == ("ok", STEPS)


@pytest.mark.parametrize("what", ["", "{", "[]"])
def test_states_of_unknown_origin_are_dropped(what: str, killed: Path, inputs: Inputs) -> None:
    (killed / "state" / "made_from.json").write_text(what)
    assert "a resume state was dropped: it was made from another model, or unknown" in run(inputs, killed).notes


@pytest.mark.parametrize("method", a_few(["full", "lora", "lisa", "grass"], one_in=3))
@pytest.mark.parametrize("every", [1, 100])
def test_divergence_is_a_record_whoever_sees_it_first(method: str, every: int, inputs: Inputs, tmp_path: Path) -> None:
    """At every step the observer is the first to see it, else the step's own loss is."""
    record = run(inputs, tmp_path, method, lr=1e30, observation=Observation(every_steps=every, rows=2))
    assert record.status == "diverged", record.status_why
    assert (tmp_path / "observed.jsonl").is_file()
    if every == 1:
        assert str(record.status_why).startswith("after ")
