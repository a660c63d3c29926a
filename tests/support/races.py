"""Whether two accesses of the same memory are ordered, whatever the speed of the queues: vector clocks.

Actors are the host and the queues of `grass.offload.streams`. An operation carries the clock of its actor as it was
enqueued; one comes before another if the other's clock has seen it (Mattern 1989, "Virtual Time and Global States of
Distributed Systems"; Fidge 1988). No order of execution is looked at, so one run speaks for every legal interleaving of
what it enqueued.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

ACTORS = ("host", "compute", "fetch", "return")
Clock = tuple[int, ...]
"""How many operations of each actor have been seen, in the order of `ACTORS`."""
Region = tuple[int, int, int]
"""A storage's address, and the first byte in it and the one after the last."""


def regions(tensor: Tensor) -> list[Region]:
    """Bytes that a tensor of dense rows covers, one region a row."""
    storage, size = tensor.untyped_storage().data_ptr(), tensor.element_size()
    rows = [tensor.reshape(-1)] if tensor.is_contiguous() else [row for half in tensor for row in half.reshape(1, -1)]
    starts = [row.storage_offset() * size for row in rows]
    return [(storage, start, start + row.numel() * size) for start, row in zip(starts, rows, strict=True)]


@dataclass(frozen=True)
class _Access:
    """One operation's access of some bytes of a storage."""

    operation: str
    actor: int
    clock: Clock
    start: int
    end: int
    writes: bool

    def before(self, other: _Access) -> bool:
        return other.clock[self.actor] >= self.clock[self.actor]


class RaceChecker:
    """Collects operations in the order in which the host enqueues them; `races` names those that are not ordered."""

    def __init__(self) -> None:
        self.races: list[str] = []
        self.operations = 0
        self._clocks: dict[str, Clock] = dict.fromkeys(ACTORS, (0,) * len(ACTORS))
        self._accesses: dict[int, list[_Access]] = {}
        """By storage; without those that later ones cover, which come before whatever comes after the later one."""

    def operation(self, actor: str, name: str, *, reads: Iterable[Tensor] = (), writes: Iterable[Tensor] = ()) -> None:
        """The host enqueues an operation of `actor`, or does it itself."""
        number = ACTORS.index(actor)
        # what the host did, or waited for, happened before anything that it enqueues now
        seen = list(_joined(self._clocks[actor], self._clocks["host"]))
        seen[number] += 1
        clock = self._clocks[actor] = tuple(seen)
        self.operations += 1
        for tensors, is_write in ((reads, False), (writes, True)):
            for storage, start, end in (region for tensor in tensors for region in regions(tensor)):
                self._look(storage, _Access(f"{actor} {name}", number, clock, start, end, is_write))

    def _look(self, storage: int, new: _Access) -> None:
        kept = []
        for old in self._accesses.get(storage, []):
            before = old.before(new)
            overlap = old.start < new.end and new.start < old.end
            if overlap and not before and (old.writes or new.writes):
                first, last = max(old.start, new.start), min(old.end, new.end)
                self.races.append(f"race in bytes {first} to {last}: [{old.operation}] and [{new.operation}]")
            covered = new.start <= old.start and old.end <= new.end and (new.writes or not old.writes)
            if not (before and covered):
                kept.append(old)
        self._accesses[storage] = [*kept, new]

    def mark(self, actor: str) -> Clock:
        """What an event recorded on `actor` now has seen."""
        return _joined(self._clocks[actor], self._clocks["host"])

    def wait(self, actor: str, clock: Clock) -> None:
        """What `actor` does from here on comes after what `clock` has seen."""
        self._clocks[actor] = _joined(self._clocks[actor], clock)

    def settle(self) -> None:
        """The host has seen everything; so will whatever it enqueues later."""
        for actor in ACTORS:
            self.wait("host", self._clocks[actor])
        self._accesses.clear()


def _joined(one: Clock, other: Clock) -> Clock:
    return tuple(map(max, one, other))
