"""Broken copies of the state offload: each one line of it changed, each to be caught by some check."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import ModuleType

import pytest

import grass.offload.hooks
import grass.offload.offload
import grass.offload.states


@dataclass(frozen=True)
class Defect:
    """One change of the source."""

    name: str
    line: str
    broken: str
    modes: tuple[str, ...]
    """Where to look: `resident`, `move`, or both."""
    module: ModuleType = grass.offload.offload
    state: str = "keep"

    def __str__(self) -> str:
        return self.name

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let every `Grass` built from here on run the broken copy."""
        source = inspect.getsource(self.module)
        assert source.count(self.line) == 1, (
            f"{self.name} changes a line that is not there (once) any more: {self.line}"
        )
        broken = ModuleType(self.module.__name__)
        exec(compile(source.replace(self.line, self.broken), f"<{self.name}>", "exec"), broken.__dict__)
        if self.module is grass.offload.offload:
            # what other patches put there, beside the host in force
            broken.__dict__.update(RING=RING)
        user, what = {
            grass.offload.offload: ("grass.offload.states", "StateOffload"),
            grass.offload.hooks: ("grass.offload.states", "LayerHooks"),
            grass.offload.states: ("grass.optimizer", "LayerStates"),
        }[self.module]
        monkeypatch.setattr(f"{user}.{what}", getattr(broken, what))


RING = 3
MOVE, RESIDENT, BOTH = ("move",), ("resident",), ("move", "resident")

DEFECTS = [
    # an event that is not waited for
    Defect("UpdatesBeforeTheFetch", 'self.streams.wait("compute", staged.ready)', "pass", MOVE),
    Defect(
        "WritesBackBeforeTheUpdate",
        'self.streams.wait("return", self.streams.mark("compute"))\n            assert',
        "assert",
        MOVE,
    ),
    Defect("FetchesBeforeTheWriteBack", 'self.streams.wait("fetch", written)', "pass", MOVE),
    Defect("FreesBeforeTheWriteBack", 'self.streams.wait("compute", event)', "pass", MOVE),
    Defect("ReusesARingBufferAtOnce", "self.streams.wait(queue, event)", "pass", MOVE),
    Defect("FetchesIntoMemoryInUse", 'self.streams.wait("fetch", self.streams.mark("compute"))', "pass", MOVE),
    Defect(
        "HandsOnABufferThatIsLeaving",
        "self._returning.append((buffer, event))\n\n",
        'self._returning.append((buffer, streams.mark("compute")))\n\n',
        RESIDENT,
    ),
    Defect(
        "FallsAsleepBeforeTheUpdate",
        'streams.wait("return", streams.mark("compute"))\n        self._copy',
        "self._copy",
        RESIDENT,
    ),
    Defect("WakesBeforeItIsHome", 'streams.wait("fetch", block.ready)', "pass", RESIDENT),
    Defect("UpdatesBeforeItIsAwake", 'self.streams.wait("compute", block.ready)', "pass", RESIDENT),
    Defect("SavesInMidCopy", "self.streams.settle()\n        self._written", "self._written", BOTH),
    # what never comes
    Defect("WaitsForWhatWasNeverRecorded", '_Staged(buffer, self.streams.mark("fetch"))', "_Staged(buffer)", MOVE),
    # wrong moments
    Defect(
        "ForgetsOneWriteBack",
        'self._copy("return", block.host[:, chunk.start : chunk.end], moments)\n',
        'number == 1 or self._copy("return", block.host[:, chunk.start : chunk.end], moments)\n',
        MOVE,
    ),
    Defect(
        "WritesBackToTheWrongPlace",
        'self._copy("return", block.host[:, chunk.start : chunk.end], moments)',
        'self._copy("return", block.host[:, -chunk.elements :], moments)',
        MOVE,
    ),
    Defect(
        "SharesOneStepCount",
        'step, bits = self._optimizer.state[p]["step"], None',
        'step, bits = max(state["step"] for state in self._optimizer.state.values()), None',
        BOTH,
        grass.offload.states,
    ),
    Defect("ResetKeepsMoments", "if not keep:", "if False:", BOTH, state="reset"),
    # memory
    Defect("ResetKeepsTheHostBlock", "self.arena.release(block.host)", "pass", MOVE, state="reset"),
    Defect("KeepsReturnedBuffers", "self._states.release(keep=", "(", MOVE, grass.offload.hooks),
    Defect("KeepsWhatWasFetchedForNothing", "self._states.drop_fetched()", "pass", MOVE, grass.offload.hooks),
    Defect("StaysOnTheDevice", "self._send_home(block)", "pass", RESIDENT),
    Defect("GrowsTheRing", "ring[dtype] -= 1", "pass", MOVE),
    Defect("LeavesBuffersBehind", "self.offload.forget(block)", "pass", RESIDENT, grass.offload.states),
]
