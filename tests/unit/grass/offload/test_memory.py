"""What the state offload holds on the device and when, and how `auto` decides."""

from __future__ import annotations

from typing import Any

import pytest
from fake_streams import RecordingStreams, Scripted
from grass_tiny import batch
from offload_runs import STEPS, Setting, difference, expected, on_device, outcome, train

import grass.offload.offload

KEEP = Setting()
TOP = Setting(sampler="importance")
"""The embedding does not train: once the lowest active layer is done, the distance to the peak is room."""


class Counting(Scripted):
    """An allocator with `base` bytes in use beside the buffers, and a peak of its own."""

    def __init__(self, base: int, peak: int) -> None:
        super().__init__(most=peak)
        self.base = base
        self.streams: RecordingStreams | None = None
        self.seen = 0

    def allocated(self) -> int:
        assert self.streams is not None
        return self.base + self.streams.live_bytes


def counting(base: int, peak: int) -> RecordingStreams:
    numbers = Counting(base, peak)
    numbers.streams = RecordingStreams(numbers=numbers)
    return numbers.streams


def watched_layers(model: Any, look: Any) -> None:
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: look())


def test_moving_states_use_the_ring_and_nothing_else_where_nobody_counts_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = RecordingStreams(numbers=Scripted())
    model, opt = on_device(KEEP, monkeypatch, streams, offload="move")
    for step in range(6):
        KEEP.backward(model, opt, step, lambda: setattr(streams, "most_live", len(streams.live)))
        assert streams.live == {}, "from the last release to the first fetch"
        opt.step()
        opt.zero_grad()
        assert streams.most_live == grass.offload.offload.RING
        largest = max(chunk.elements for block in opt.states.blocks for chunk in block.chunks)
        assert {buffer.shape for buffer in streams.live.values()} <= {(2, largest)}


def test_returned_buffers_are_freed_layer_by_layer_as_activations_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grass.offload.offload.RING", 8)
    streams = RecordingStreams(numbers=Scripted(), eagerness=0.0)
    model, opt = on_device(KEEP, monkeypatch, streams, offload="move")
    monkeypatch.setattr("grass.offload.offload.RING", 8)
    train(KEEP, model, opt, last=1)
    assert len(streams.live) == 8
    alive: list[int] = []
    watched_layers(model, lambda: alive.append(len(streams.live)))
    model(**batch(1))
    assert alive == [6, 4, 2, 0]


@pytest.mark.parametrize("room", [0, 3, 9, 100])
def test_what_backward_fetches_leaves_the_update_room_below_the_peak(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for so many chunks of 4096 bytes, beside the ring of the update and one piece's temporaries."""
    ring_and_temporaries = 3 * 4096 + grass.offload.offload.TEMPORARY_BYTES * 240
    peak = 100_000 + ring_and_temporaries + room * 4096
    streams = counting(100_000, peak)
    model, opt = on_device(TOP, monkeypatch, streams, offload="move")
    fetched = []
    for step in range(6):
        before = len(streams.copies)
        TOP.backward(model, opt, step)
        fetched.append(len(streams.copies) - before)
        assert 100_000 + streams.live_bytes + ring_and_temporaries <= peak
        opt.step()
        opt.zero_grad()
    of_layers = sum(len(opt.states.layer_blocks[layer].chunks) for layer in opt.active)
    # the first step builds the hooks, and the first of every period only watches
    assert fetched[:2] == [0, 0]
    assert fetched[3] == 0
    assert room <= fetched[2] <= of_layers if room < of_layers else fetched[2] == of_layers
    assert difference(outcome(model, opt), expected(TOP, 6)[0]) is None


@pytest.mark.parametrize("mode", ["resident", "move"])
def test_moments_of_sleeping_layers_are_on_the_host_from_the_change_on(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = RecordingStreams(5)
    model, opt = on_device(KEEP, monkeypatch, streams, offload=mode)
    slept = set()
    for step in range(12):
        train(KEEP, model, opt, step, step + 1)
        for layer in set(range(4)) - set(opt.active):
            block = opt.states.layer_blocks[layer]
            if block.home is not None:
                slept.add(layer)
                assert block.home is block.host
                assert not streams.live.keys() & {block.home.data_ptr()}
                assert opt.state[block.parameters[0]]["exp_avg"].data_ptr() == block.home.data_ptr()
    assert len(slept) > 1


def test_a_layer_that_wakes_takes_over_the_buffer_of_one_that_falls_asleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where both have moments: the number of buffers never exceeds that of awake groups."""
    streams = RecordingStreams(5)
    model, opt = on_device(KEEP, monkeypatch, streams, offload="resident", active_layers=1)
    train(KEEP, model, opt, last=24)
    assert all(block.home is not None for block in opt.states.blocks)
    streams.most_live = 0
    swaps = len(streams.copies)
    train(KEEP, model, opt, 24, 36)
    assert len(streams.copies) > swaps
    assert streams.most_live == 0, "nothing was allocated"
    assert len(streams.live) == len(opt.states.awake(opt.active))


@pytest.mark.parametrize(
    ("free", "mode", "verdict"), [(10**6, "resident", "they stay"), (45_000, "move", "they move")], ids=str
)
def test_auto_decides_by_what_is_free_at_peak_once_layers_change(
    free: int, mode: str, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = RecordingStreams(numbers=Scripted(now=0, most=0, free=free))
    model, opt = on_device(KEEP, monkeypatch, streams, offload="auto")
    assert opt.states.why == "nothing has trained yet"
    train(KEEP, model, opt, last=2)
    assert (opt.states.mode, opt.states.why) == ("move", "auto: watching the peak")
    train(KEEP, model, opt, 2, 3)
    needed = sum(block.nbytes for block in opt.states.awake(opt.active))
    assert opt.states.why == f"auto: {free:,} bytes free at peak, {needed:,} bytes of states in use: {verdict}"
    train(KEEP, model, opt, 3)
    assert [record.mode for record in opt.history] == ["move"] * 3 + [mode] * (STEPS - 3)
    assert difference(outcome(model, opt), expected(KEEP)[0]) is None


def test_auto_lets_go_of_what_was_fetched_when_it_decides_to_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backward pass whose step never came, then a change of layers."""
    streams = RecordingStreams(numbers=Scripted(now=0, most=1 << 20, free=10**6))
    model, opt = on_device(TOP, monkeypatch, streams, offload="auto")
    train(TOP, model, opt, last=2)
    TOP.backward(model, opt, 2)
    assert streams.live
    opt.states.change(opt.active, 1)
    assert opt.states.offload is not None
    assert opt.states.mode == "resident"
    homes = {block.home.data_ptr() for block in opt.states.awake(opt.active) if block.home is not None}
    assert len(streams.live) == len(homes) + opt.states.offload.returning
    model(**batch(3))
    assert streams.live.keys() == homes


def test_what_a_step_moved_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, opt = on_device(TOP, monkeypatch, RecordingStreams(numbers=Scripted()), offload="move")
    for step in range(5):
        train(TOP, model, opt, step, step + 1)
        awake = opt.states.awake(opt.history[-1].active)
        assert opt.history[-1].moved_bytes == 2 * sum(block.nbytes for block in awake)
