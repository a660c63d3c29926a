"""The checks of the state offload are worth what they catch: every broken copy of it is caught by one of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from fake_streams import DeadlockError, RecordingStreams, Scripted, install
from grass_tiny import llama
from offload_calls import Calls
from offload_defects import DEFECTS, Defect
from offload_runs import (
    Outcome,
    Setting,
    difference,
    expected,
    first_problem,
    outcome,
    problem_at_end,
    small_chunks,
)

import grass.offload.offload

SAMPLERS = ("uniform", "importance")


def finding(mode: str, state: str, sampler: str, defect: Defect | None = None) -> str | None:
    """What is wrong with a run, and what found it; None where nothing is."""
    # two passes a step, the last one announced: what the first one fetches is fetched for nothing
    setting = Setting(state=state, sampler=sampler, accumulation="told")
    wanted = expected(setting)[0]
    numbers = None if sampler == "uniform" else Scripted(now=0, most=1 << 20)
    streams = RecordingStreams(0, numbers)
    with pytest.MonkeyPatch.context() as patched:
        small_chunks(patched)
        install(patched, streams)
        if defect is not None:
            defect.plant(patched)
        return _finding(setting, streams, mode, wanted)


def _finding(setting: Setting, streams: RecordingStreams, mode: str, wanted: Outcome) -> str | None:
    model = llama()
    opt = setting.build(model, offload=mode)
    try:
        problem = first_problem(setting, model, opt, streams)
        if problem is not None:
            return f"{'race checker' if 'race' in problem else 'count of memory'}: {problem}"
        differs = difference(outcome(model, opt), wanted)
        if differs is not None:
            return f"comparison of bits: {differs}"
        problem = problem_at_end(opt, streams)
        return None if problem is None else f"end of the run: {problem}"
    except DeadlockError as deadlock:
        return f"deadlock: {deadlock}"


def finding_in_calls(mode: str, seed: int, defect: Defect) -> str | None:
    """The same in calls of a random order."""
    with pytest.MonkeyPatch.context() as patched:
        defect.plant(patched)
        try:
            problem = Calls(seed, mode, patched).run(100)
        except DeadlockError as deadlock:
            problem = f"deadlock: {deadlock}"
        return None if problem is None else f"calls in random order: {problem}"


@pytest.mark.parametrize("defect", DEFECTS, ids=str)
def test_defect_is_caught(defect: Defect, record_property: Callable[[str, object], None]) -> None:
    for mode in defect.modes:
        trained = (finding(mode, defect.state, sampler, defect) for sampler in SAMPLERS)
        called = (
            finding_in_calls(mode, seed, defect) for seed in range(5 if defect.module is grass.offload.offload else 0)
        )
        found = next((problem for problem in itertools.chain(called, trained) if problem is not None), None)
        assert found is not None, f"{defect} passes every check in mode {mode}"
    record_property("defect", defect.name)
    record_property("caught_by", found)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("state", ["keep", "reset"])
@pytest.mark.parametrize("mode", ["resident", "move"])
def test_the_same_checks_find_nothing_without_a_defect(mode: str, state: str, sampler: str) -> None:
    assert finding(mode, state, sampler) is None
