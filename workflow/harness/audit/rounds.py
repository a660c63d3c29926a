"""Counts what was seen: events of one step are gathered in a round, rounds with the same set in an interval."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from harness.audit.facts import Event, Facts, StateBytes

Names = dict[Event, set[str]]


@dataclass
class Round:
    """Every optimizer's step, each at most once."""

    stepped: set[int] = field(default_factory=set)
    """Numbers of the optimizers that have stepped in it."""
    events: Names = field(default_factory=lambda: defaultdict(set))
    acted: bool = False
    """Whether some step moved a weight."""


class Tally:
    """Merges rounds into intervals, and counts intervals in `facts`."""

    def __init__(self, facts: Facts, interval_steps: int) -> None:
        self._facts = facts
        self._interval_steps = interval_steps
        self._events: Names | None = None
        self._began = 0

    def add(self, done: Round, state_bytes: tuple[int, int]) -> bool:
        """Count one round; the result says whether an interval ended before it.

        Args:
            done: the round.
            state_bytes: after it, in all and of sleeping parameters.
        """
        facts = self._facts
        if not done.acted:
            done.events.pop("pending", None)
        before = self._events
        full = facts.steps - self._began >= self._interval_steps
        begins = before is None or full or before["on"] != done.events["on"]
        if begins:
            self.end_interval()
            self._events, self._began = defaultdict(set), facts.steps
            facts.intervals += 1
            facts.sets.append(frozenset(facts.tensors[name].part for name in done.events["on"]))
            facts.state.append(StateBytes(facts.steps + 1, *state_bytes))
        facts.steps += 1
        assert self._events is not None
        for event, names in done.events.items():
            self._events[event] |= names
        return begins and before is not None

    def end_interval(self) -> None:
        """Add the interval's events to the counts."""
        events: Mapping[Event, set[str]] = self._events or {}
        for event, names in events.items():
            for name in names:
                tensor = self._facts.tensors[name]
                setattr(tensor, event, getattr(tensor, event) + 1)
        self._events = None
