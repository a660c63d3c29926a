"""A killed pretraining goes on to the same weights and the same loss curve."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness.inputs import pretrain as module
from harness.inputs.pretrain import pretrain
from harness.step import resume
from harness.study.sources import PretrainedHere
from safetensors.torch import load_file

SOURCE = PretrainedHere(
    kind="pretrain", layers=1, width=16, heads=2, feed_forward=16, steps=20, rows=2, length=16, lr=1e-2, seed=0,
    corpus={"one_step_share": 0.3, "fact_share": 0.8, "guess_share": 0.5},
)  # fmt: skip


class KilledError(Exception):
    """Stands for a killed process."""


def test_it_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = pretrain(SOURCE, tmp_path / "straight")
    usual = module.nn.utils.clip_grad_norm_
    steps: list[int] = []

    def dies(*given: object) -> object:
        steps.append(1)
        if len(steps) == 13:
            raise KilledError
        return usual(*given)

    with monkeypatch.context() as patch:
        patch.setattr(module.nn.utils, "clip_grad_norm_", dies)
        with pytest.raises(KilledError):
            pretrain(SOURCE, tmp_path / "killed", state_folder=tmp_path / "state")
    assert [path.name for path in resume.manifests(tmp_path / "state")] == ["step12.json", "step10.json"]
    before = torch.get_rng_state()
    with monkeypatch.context() as patch:
        steps[:] = [1] * 13
        patch.setattr(module.nn.utils, "clip_grad_norm_", lambda *given: (steps.append(1), usual(*given)))
        again = pretrain(SOURCE, tmp_path / "killed", state_folder=tmp_path / "state")
    assert len(steps) == 13 + 8, "steps 13 to 20"
    assert torch.equal(torch.get_rng_state(), before)
    assert again == straight
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("straight", "killed")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
