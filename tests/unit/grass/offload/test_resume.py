"""Saving and resuming in the middle of copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fake_streams import RecordingStreams
from offload_runs import (
    Setting,
    difference,
    expected,
    first_problem,
    on_device,
    outcome,
    problem_at_end,
    saved,
    train,
)

KEEP, RESET = Setting(), Setting(state="reset", sampler="importance")


def finished(setting: Setting, state: dict[str, Any], weights: dict[str, Any], at: int, mode: str) -> str | None:
    """Resume a run on a fresh optimizer, finish it, and compare with the run that never stopped."""
    with pytest.MonkeyPatch.context() as patched:
        first, second = RecordingStreams(1), RecordingStreams(2)
        model, opt = on_device(setting, patched, first, second, offload=mode, seed=99)
        model.load_state_dict(weights)
        opt.load_state_dict(state)
        problem = first_problem(setting, model, opt, first, at)
        return problem or difference(outcome(model, opt), expected(setting)[0]) or problem_at_end(opt, first)


@pytest.mark.parametrize(("at", "backward"), [(6, False), (4, True)], ids=["at-a-change", "after-a-backward"])
@pytest.mark.parametrize("setting", [KEEP, RESET], ids=str)
@pytest.mark.parametrize("mode", ["resident", "move"])
def test_a_state_dict_taken_at_any_moment_resumes_to_the_same_bits(
    mode: str, setting: Setting, at: int, monkeypatch: pytest.MonkeyPatch, *, backward: bool
) -> None:
    """With copies under way, or with chunks on the device for a step that never comes."""
    streams = RecordingStreams(at)
    model, opt = on_device(setting, monkeypatch, streams, offload=mode)
    train(setting, model, opt, 0, at)
    if backward:
        setting.backward(model, opt, at)
    state = copy.deepcopy(saved(opt, streams))
    weights = copy.deepcopy(model.state_dict())
    opt.zero_grad()
    assert finished(setting, state, weights, at, {"resident": "auto", "move": "move"}[mode]) is None
    assert finished(setting, state, weights, at, "resident") is None
    train(setting, model, opt, at)
    assert difference(outcome(model, opt), expected(setting)[0]) is None
    assert problem_at_end(opt, streams) is None


@pytest.mark.parametrize("copied", [False, True], ids=["as-it-is", "copied"])
@pytest.mark.parametrize("mode", ["resident", "move"])
def test_an_optimizer_may_load_its_own_state_dict(mode: str, monkeypatch: pytest.MonkeyPatch, *, copied: bool) -> None:
    """As accelerate does in `prepare`; a copy to the device where a tensor is already is that very tensor."""
    from accelerate.optimizer import move_to_device

    streams, again = RecordingStreams(1), RecordingStreams(2)
    model, opt = on_device(KEEP, monkeypatch, streams, again, offload=mode)
    train(KEEP, model, opt, 0, 5)
    before = outcome(model, opt)
    state = move_to_device(opt.state_dict(), torch.device("cpu"))
    opt.load_state_dict(copy.deepcopy(state) if copied else state)
    assert difference(outcome(model, opt), before) is None
    assert not streams.live
    awake = {p for block in opt.states.awake(opt.active) for p in block.parameters}
    for p, moments in opt.state.items():
        for moment in (moments["exp_avg"], moments["exp_avg_sq"]):
            assert moment.dtype == torch.float32
            assert (moment.untyped_storage().data_ptr() in again.live) is (mode == "resident" and p in awake)
    assert first_problem(KEEP, model, opt, again, 5) is None
    assert difference(outcome(model, opt), expected(KEEP)[0]) is None


def test_a_state_dict_of_an_earlier_step_can_be_loaded_while_copies_are_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams, again = RecordingStreams(3, eagerness=0.0), RecordingStreams(4)
    model, opt = on_device(KEEP, monkeypatch, streams, again, offload="move")
    train(KEEP, model, opt, 0, 4)
    state = opt.state_dict()  # views, that go on changing
    train(KEEP, model, opt, 4, 5)
    opt.load_state_dict(state)
    assert difference(outcome(model, opt), expected(KEEP, 5)[0]) is None
    assert not streams.checker.races
