"""The tracker counts storages as they come and go, on real and on fake tensors."""

from __future__ import annotations

import mmap

import torch
from harness.forecasting.tracker import Tracker
from torch._subclasses.fake_tensor import FakeTensorMode


def test_sizes_are_rounded_up_to_512_bytes_and_counted_until_they_die() -> None:
    with Tracker() as tracker:
        small, large = torch.zeros(1), torch.zeros(200)
        assert tracker.now == 512 + 1024
        del large
        assert tracker.now == 512
        assert tracker.peak == 1536
        del small
    assert tracker.now == 0


def test_fake_tensors_count_like_real_ones() -> None:
    with FakeTensorMode(), Tracker() as tracker:
        made = torch.zeros(1000, 1000)
        twice = made @ made
        del made
        assert tracker.now == 4_000_256
        assert tracker.peak == 8_000_512
        del twice
        assert tracker.now == 0


def test_views_and_updates_in_place_are_no_new_memory() -> None:
    with Tracker() as tracker:
        made = torch.zeros(256)
        views = [made[:10], made.view(16, 16), made.add_(1), made.detach()]
        assert tracker.now == 1024
        del made
        assert tracker.now == 1024
        del views
        assert tracker.now == 0


def test_a_storage_lives_as_long_as_the_graph_that_saved_it() -> None:
    weight = torch.ones(128, requires_grad=True)
    with Tracker() as tracker:
        squared = (weight.exp() ** 2).sum()
        alive = tracker.now
        assert alive > 512  # what backward needs, and the sum
        squared.backward()
        assert tracker.now < alive + 512
        del squared
        weight.grad = None
    assert tracker.now == 0


def test_memory_made_from_a_python_buffer_is_not_device_memory() -> None:
    with Tracker() as tracker:
        block = torch.frombuffer(mmap.mmap(-1, 4096), dtype=torch.float32).view(2, 512)
        block[0].zero_()
        assert tracker.now == 0


def test_host_memory_is_a_tier_of_its_own() -> None:
    with Tracker() as tracker:
        with tracker.on_host():
            block = torch.zeros(300)
        view = block[:10]
        assert (tracker.now, tracker.host) == (0, 1200)
        assert not tracker.holds(view)
        del block, view
        assert tracker.host == 0


def test_every_phase_has_its_own_peak() -> None:
    with Tracker() as tracker:
        tracker.enter("one", "first")
        kept, passing = torch.zeros(128), torch.zeros(1280)
        del passing
        tracker.enter("two")
        more = torch.zeros(256)
        tracker.enter("three")
    assert [(span.phase, span.label, span.peak_bytes) for span in tracker.spans] == [
        ("one", "first", 512 + 5120),
        ("two", "", 512 + 1024),
    ]
    assert [span.largest_elements for span in tracker.spans] == [1280, 256]
    del kept, more


def test_kinds_at_a_peak_are_those_of_what_was_alive_then() -> None:
    """Also of storages whose kind was found later, and of those that are gone by now."""
    with Tracker() as tracker:
        tracker.enter("all")
        tracker.making = "activations"
        passing, made = torch.zeros(128), torch.zeros(256)
        tracker.making = "loss"
        logits = torch.zeros(512)
        del passing
        tracker.mark("gradients", [made])
        del logits
        tracker.enter("over")
        kinds = tracker.by_kind(tracker.spans[0].at)
    assert kinds == {
        "weights": 0, "gradients": 1024, "optimizer states": 0, "activations": 512, "loss": 2048, "other": 0,
    }  # fmt: skip
    assert sum(kinds.values()) == tracker.spans[0].peak_bytes


def test_a_restart_forgets_the_peak_before_it() -> None:
    with Tracker() as tracker:
        passing = torch.zeros(1024)
        del passing
        tracker.restart()
        assert tracker.peak == 0
