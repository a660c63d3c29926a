"""Streams without a device: copies are recorded, checked for races, and done late, in a random legal order.

"Device" buffers are CPU memory that is poisoned when it is freed and handed out again, as a caching allocator does.
The compute queue is eager, because the model's own passes run on real tensors; fetches and returns are done when
something must wait for them, or at random before. The race checker sees the orders in which compute lags behind, too.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import pytest
import torch
from races import Clock, RaceChecker
from torch import Tensor

from grass.host import Host
from grass.offload.arena import HostArena
from grass.offload.streams import Queue, Streams

Copying = Literal["fetch", "return"]


class DeadlockError(AssertionError):
    """A queue waits for what never comes."""


@dataclass(frozen=True)
class Event:
    """Done when `position` operations of `queue` are; with a position of None it was never recorded."""

    queue: Queue
    position: int | None
    clock: Clock


class Numbers(Protocol):
    """What the allocator says."""

    def allocated(self) -> int | None: ...
    def peak(self) -> int | None: ...
    def obtainable(self) -> int | None: ...


class RandomNumbers:
    """Any headroom, anew at every question: chunks are fetched during backward in random amounts."""

    def __init__(self, seed: int, peak: int = 1 << 17) -> None:
        self._random, self._peak = random.Random(seed), peak

    def allocated(self) -> int:
        return self._random.randrange(self._peak)

    def peak(self) -> int:
        return self._peak

    def obtainable(self) -> int:
        return self._peak + self._random.randrange(self._peak)


@dataclass
class Scripted:
    """The numbers that a test sets; None: nobody counts."""

    now: int | None = None
    most: int | None = None
    free: int | None = None
    """On top of `most`."""

    def allocated(self) -> int | None:
        return self.now

    def peak(self) -> int | None:
        return self.most

    def obtainable(self) -> int | None:
        return None if self.free is None or self.most is None else self.most + self.free


class RecordingStreams:
    """The `Streams` of a device that does not exist; see the head of this file.

    Args:
        seed: of the order in which copies are done, and of which freed memory is handed out again.
        numbers: what the allocator says, through `CountedHost`; by default random ones.
        eagerness: chance of one more copy wherever some may be done; 0: as late as possible. By default random.
    """

    apart = True

    def __init__(self, seed: int = 0, numbers: Numbers | None = None, eagerness: float | None = None) -> None:
        self.numbers = numbers if numbers is not None else RandomNumbers(seed)
        self.checker = RaceChecker()
        self.live: dict[int, Tensor] = {}
        """Buffers in use, by address."""
        self.most_live = 0
        """Largest number of buffers in use at once since this was last set."""
        self.copies: list[str] = []
        self._random = random.Random(seed)
        self._eagerness = self._random.choice([0.0, 0.3, 0.9]) if eagerness is None else eagerness
        self._memory: dict[int, Tensor] = {}
        """All memory there ever was, by address."""
        self._pool: list[Tensor] = []
        self._names: dict[int, str] = {}
        self._named = {"buffer": 0, "host block": 0}
        self._waiting: dict[Queue, deque[Event | Callable[[], Any]]] = {"fetch": deque(), "return": deque()}
        self._enqueued: dict[Queue, int] = {"compute": 0, "fetch": 0, "return": 0}
        self._finished: dict[Queue, int] = {"compute": 0, "fetch": 0, "return": 0}
        self._compute_waits: list[Event] = []

    # ------------------------------------------------------------ memory

    def allocate(self, elements: int, dtype: torch.dtype) -> Tensor:
        self._catch_up()
        nbytes = 2 * elements * dtype.itemsize
        fitting = [memory for memory in self._pool if memory.numel() >= nbytes]
        if fitting and self._random.random() < 0.9:
            memory = self._random.choice(fitting)
            self._pool = [other for other in self._pool if other is not memory]
        else:
            memory = _poisoned(torch.empty(nbytes, dtype=torch.uint8))
            self._memory[memory.data_ptr()] = memory
        buffer = memory[:nbytes].view(dtype).view(2, elements)
        self._name(buffer, "buffer")
        self.checker.operation("compute", f"allocates {self.named(buffer)}", writes=[buffer])
        self.live[memory.data_ptr()] = buffer
        self.most_live = max(self.most_live, len(self.live))
        return buffer

    def free(self, buffer: Tensor) -> None:
        self._catch_up()
        assert buffer.data_ptr() in self.live, f"{self.named(buffer)} is freed twice"
        del self.live[buffer.data_ptr()]
        memory = self._memory[buffer.data_ptr()]
        self.checker.operation("compute", f"frees {self.named(buffer)}", writes=[memory])
        self._pool.append(_poisoned(memory))

    @property
    def live_bytes(self) -> int:
        """Of the buffers in use."""
        return sum(buffer.nbytes for buffer in self.live.values())

    @property
    def pending(self) -> int:
        """Copies, and waits for others, that are still to be done."""
        return sum(map(len, self._waiting.values()))

    def host(self, doing: str, tensor: Tensor, *, writes: bool) -> None:
        """The host itself reads or writes a moment; where that is on the device, `compute` does it."""
        on_device = tensor.untyped_storage().data_ptr() in self.live
        touched = {"writes" if writes else "reads": [tensor]}
        self.checker.operation("compute" if on_device else "host", f"{doing} {self.named(tensor)}", **touched)

    def take(self, block: Tensor) -> None:
        """The host got this memory for a block."""
        self._name(block, "host block")
        self.host("takes", block, writes=True)

    # ------------------------------------------------------------ queues

    def copy(self, queue: Copying, target: Tensor, source: Tensor) -> None:
        assert target.shape == source.shape
        name = f"copies {self.named(source)} to {self.named(target)}"
        self.checker.operation(queue, name, reads=[source], writes=[target])
        self.copies.append(f"{queue} {name}")
        self._enqueue(queue, lambda: target.copy_(source))
        self._do_some()

    def compute(self, action: Callable[[], None], buffer: Tensor) -> None:
        self._catch_up()
        self.checker.operation("compute", f"updates {self.named(buffer)}", reads=[buffer], writes=[buffer])
        action()

    def mark(self, queue: Queue) -> Event:
        if queue == "compute":
            self._catch_up()
        return Event(queue, self._enqueued[queue], self.checker.mark(queue))

    def wait(self, queue: Queue, event: Any) -> None:
        if not isinstance(event, Event) or event.position is None:
            raise DeadlockError(f"{queue} waits for an event that was never recorded")
        self.checker.wait(queue, event.clock)
        if queue == "compute":
            self._compute_waits.append(event)
        else:
            self._enqueue(queue, event)
        self._do_some()

    def done(self, event: Event) -> bool:
        self._do_some()
        is_done = self._is_done(event)
        if is_done:
            self.checker.wait("host", event.clock)
        return is_done

    def settle(self) -> None:
        self._catch_up()
        for queue in self._waiting:
            self._finish(Event(queue, self._enqueued[queue], ()))
        self.checker.settle()

    def exposed(self) -> Callable[[], float | None]:
        return lambda: None

    # ------------------------------------------------------------ execution

    def _enqueue(self, queue: Queue, what: Event | Callable[[], Any]) -> None:
        self._waiting[queue].append(what)
        self._enqueued[queue] += 1

    def _is_done(self, event: Event) -> bool:
        assert event.position is not None
        return self._finished[event.queue] >= event.position

    def _step(self, queue: Queue) -> None:
        what = self._waiting[queue].popleft()
        if not isinstance(what, Event):
            what()
        self._finished[queue] += 1

    def _do_some(self) -> None:
        """A random number of operations that may be done now."""
        while self._random.random() < self._eagerness:
            queue = self._random.choice(list(self._waiting))
            head = self._waiting[queue][0] if self._waiting[queue] else None
            if head is not None and (not isinstance(head, Event) or self._is_done(head)):
                self._step(queue)

    def _catch_up(self) -> None:
        """What `compute` was told to wait for, and more."""
        while self._compute_waits:
            self._finish(self._compute_waits.pop(0))
        self._do_some()

    def _finish(self, event: Event, above: tuple[Queue, ...] = ()) -> None:
        assert event.position is not None
        while not self._is_done(event):
            if event.queue in above or event.position > self._enqueued[event.queue]:
                raise DeadlockError(f"{' waits for '.join([*above, event.queue])}, which cannot go on")
            head = self._waiting[event.queue][0]
            if isinstance(head, Event):
                self._finish(head, (*above, event.queue))
            self._step(event.queue)

    # ------------------------------------------------------------ names

    def _name(self, tensor: Tensor, kind: str) -> None:
        self._named[kind] += 1
        self._names[tensor.untyped_storage().data_ptr()] = f"{kind} {self._named[kind]}"

    def named(self, tensor: Tensor) -> str:
        """What a race report calls a tensor."""
        first = tensor.storage_offset()
        name = self._names.get(tensor.untyped_storage().data_ptr(), "unknown memory")
        return f"{name}[{first}:{first + tensor.shape[-1]}]"


def _poisoned(memory: Tensor) -> Tensor:
    # all bits set: NaN in every floating dtype
    return memory.fill_(255)


class CountedHost(Host):
    """A device whose allocator says what a test wants."""

    def __init__(self, numbers: Numbers) -> None:
        self._numbers = numbers

    def allocated_bytes(self, device: torch.device) -> int | None:
        return self._numbers.allocated()

    def peak_bytes(self, device: torch.device) -> int | None:
        return self._numbers.peak()

    def obtainable_bytes(self, device: torch.device) -> int | None:
        return self._numbers.obtainable()


class RecordedArena(HostArena):
    """Tells the streams of every block."""

    def __init__(self, streams: RecordingStreams, *, pin: bool, settle: Callable[[], None]) -> None:
        super().__init__(pin=pin, settle=settle)
        self._streams = streams

    def take(self, elements: int, dtype: torch.dtype) -> Tensor:
        block = super().take(elements, dtype)
        self._streams.take(block)
        return block


class RecordingHost(CountedHost):
    """Hands out recording streams, one a state offload; the last of them says what the allocator does.

    Args:
        streams: to be handed out.
        pins: whether all blocks are pinned, on whatever device.
    """

    def __init__(self, *streams: RecordingStreams, pins: bool) -> None:
        super().__init__(streams[0].numbers)
        self._left = list(streams)
        self._pins = pins

    def streams(self, device: torch.device) -> Streams:
        self._last = self._left.pop(0)
        self._numbers = self._last.numbers
        return self._last

    def arena(self, *, pin: bool, settle: Callable[[], None]) -> HostArena:
        return RecordedArena(self._last, pin=pin or self._pins, settle=settle)


def install(monkeypatch: pytest.MonkeyPatch, *streams: RecordingStreams, pins: bool = False) -> None:
    """The state offloads that are built from here on have these, one each."""
    monkeypatch.setattr("grass.host._in_force", [RecordingHost(*streams, pins=pins)])
