"""The device that does not exist: what it finds, and that it finds nothing where nothing is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fake_streams import DeadlockError, Event, RecordingStreams
from torch import Tensor

FP32 = torch.float32


def staged(streams: RecordingStreams, host: Tensor, leave_out: str = "") -> None:
    """Fetch, update, send back, free; without one of the orders that this takes."""
    streams.take(host)
    buffer = streams.allocate(4, FP32)
    for name, before, after in (("fetch", "compute", "fetch"), ("update", "fetch", "compute")):
        if name != leave_out:
            streams.wait(after, streams.mark(before))
        if name == "fetch":
            streams.copy("fetch", buffer, host)
    streams.compute(lambda: buffer.add_(1), buffer)
    if leave_out != "return":
        streams.wait("return", streams.mark("compute"))
    streams.copy("return", host, buffer)
    if leave_out != "free":
        streams.wait("compute", streams.mark("return"))
    streams.free(buffer)
    if leave_out != "host":
        streams.settle()
    streams.host("reads", host, writes=False)


@pytest.mark.parametrize("seed", range(5))
def test_what_is_ordered_is_no_race_and_gives_the_right_numbers(seed: int) -> None:
    streams = RecordingStreams(seed)
    hosts = [torch.full((2, 4), float(i)) for i in range(5)]
    for host in hosts:
        staged(streams, host)
    assert streams.checker.races == []
    assert [float(host.mean()) for host in hosts] == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert streams.live == {}


@pytest.mark.parametrize(
    ("leave_out", "first", "second"),
    [
        ("fetch", "compute allocates buffer 1", "fetch copies host block 1"),
        ("update", "fetch copies host block 1", "compute updates buffer 1"),
        ("return", "compute updates buffer 1", "return copies buffer 1"),
        ("free", "return copies buffer 1", "compute frees buffer 1"),
        ("host", "return copies buffer 1", "host reads host block 1"),
    ],
)
@pytest.mark.parametrize("eagerness", [0.0, 0.9])
def test_each_missing_order_is_a_race_whatever_happened_to_come_first(
    leave_out: str, first: str, second: str, eagerness: float
) -> None:
    streams = RecordingStreams(eagerness=eagerness)
    staged(streams, torch.zeros(2, 4), leave_out)
    assert first in streams.checker.races[0]
    assert second in streams.checker.races[0]


def test_chunks_of_one_block_do_not_touch_each_other() -> None:
    streams = RecordingStreams()
    host, buffer = torch.zeros(2, 8), streams.allocate(8, FP32)
    streams.wait("fetch", streams.mark("compute"))
    streams.wait("return", streams.mark("compute"))
    streams.copy("fetch", buffer[:, :4], host[:, :4])
    streams.copy("return", host[:, 4:], buffer[:, 4:])
    assert streams.checker.races == []
    streams.copy("return", host[:, 3:5], buffer[:, 4:6])
    assert len(streams.checker.races) == 2, "entry 3 of either row"


def test_freed_memory_is_handed_out_again_poisoned() -> None:
    streams = RecordingStreams()
    addresses = set()
    for _ in range(20):
        buffer = streams.allocate(4, FP32)
        addresses.add(buffer.data_ptr())
        assert buffer.isnan().all()
        buffer.zero_()
        streams.free(buffer)
    assert len(addresses) < 20
    with pytest.raises(AssertionError, match="freed twice"):
        streams.free(buffer)


def test_copies_are_done_late_and_their_events_say_so() -> None:
    streams = RecordingStreams(eagerness=0.0)
    host, target = torch.ones(2, 4), torch.zeros(2, 4)
    streams.copy("fetch", target, host)
    event = streams.mark("fetch")
    assert not streams.done(event)
    assert not target.any()
    streams.settle()
    assert streams.done(event)
    assert torch.equal(target, host)


def _never(streams: RecordingStreams) -> None:
    streams.wait("compute", None)


def _circle(streams: RecordingStreams) -> None:
    clock = streams.checker.mark("host")
    streams.wait("fetch", Event("return", 1, clock))
    streams.wait("return", Event("fetch", 1, clock))
    streams.settle()


def _future(streams: RecordingStreams) -> None:
    streams.wait("fetch", Event("return", 9, streams.checker.mark("host")))
    streams.settle()


@pytest.mark.parametrize("wrong", [_never, _circle, _future])
def test_waiting_for_what_never_comes_is_a_deadlock(wrong: Callable[[RecordingStreams], None]) -> None:
    with pytest.raises(DeadlockError):
        wrong(RecordingStreams())
