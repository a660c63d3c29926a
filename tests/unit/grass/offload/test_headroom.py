"""How much may be fetched during backward: worked by hand, and against a model of a step's memory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from fake_streams import CountedHost, Scripted
from hypothesis import given, settings
from hypothesis import strategies as st

from grass.host import current, using
from grass.offload.headroom import BackwardHeadroom

DEVICE = torch.device("cpu")


@dataclass
class Step:
    """Memory of a training step, in bytes. Layers are alike; the trained ones also store gradients."""

    layers: int
    trained: tuple[int, ...]
    activations: int
    """What a layer keeps from forward to backward: its input alone under checkpointing."""
    climb: int
    """What its backward needs on top: under checkpointing, all of its activations."""
    gradients: int
    """Of one layer, stored in three parts."""
    below: int
    """Gradient of the embedding; 0: it does not train, and backward ends at the lowest trained layer."""
    states: int
    """Of one layer."""
    chunk: int
    update: int
    """What the update needs beside what was fetched."""
    extra: int = 0
    """What the backward pass of a trained layer needs beyond a sleeping one's."""
    weights: int = 1000
    numbers: Scripted = field(default_factory=lambda: Scripted(0, 0))

    def grow(self, nbytes: int) -> None:
        assert self.numbers.now is not None
        assert self.numbers.most is not None
        self.numbers.now += nbytes
        self.numbers.most = max(self.numbers.most, self.numbers.now)

    def run(self, headroom: BackwardHeadroom) -> list[tuple[int, int]]:
        """One step; returns where backward was when something was fetched, a layer, and how many bytes."""
        with using(CountedHost(self.numbers)):
            return self._run(headroom)

    def _run(self, headroom: BackwardHeadroom) -> list[tuple[int, int]]:
        self.numbers.now = self.weights
        self.grow(self.layers * self.activations)
        self.fetched: list[tuple[int, int]] = []
        stored = final = 0
        for layer in reversed(range(0 if self.below else min(self.trained), self.layers)):
            headroom.entering_layer()
            before = stored
            self.fetch(headroom, layer, final, before)
            climb = self.climb + (self.extra if layer in self.trained else 0)
            self.grow(climb)
            if layer in self.trained:
                for _ in range(3):
                    self.grow(self.gradients // 3)
                    stored += self.gradients // 3
                    headroom.gradient_ready(stored=stored - before)
                final += 1
                self.fetch(headroom, layer, final, before)
            self.grow(-climb - self.activations)
        self.grow(self.below)
        self.grow(self.update)
        headroom.step_done()
        return self.fetched

    def fetch(self, headroom: BackwardHeadroom, layer: int, final: int, stored_before: int) -> None:
        """As many chunks of the `final` layers whose gradients are final as there is room for."""
        done = sum(nbytes for _, nbytes in self.fetched)
        gradients = len(self.trained) * self.gradients + self.below - stored_before
        more_to_come = bool(self.below) or final < len(self.trained)
        now = 0
        while (
            done + now < final * self.states
            and headroom.bytes(more_to_come=more_to_come, gradients=gradients, update=self.update) >= self.chunk
        ):
            headroom.taken(self.chunk)
            self.grow(self.chunk)
            now += self.chunk
        if now:
            self.fetched.append((layer, now))


def test_under_checkpointing_there_is_room_for_what_the_floor_drops() -> None:
    """Six layers keep 100 bytes each and climb 500; layers 4 and 0 train, the embedding does not.

    Floors from the top: 1600, 1500, then with 90 bytes of gradients 1490, 1390, 1290, 1190; the peak is 1600 + 500.
    From the highest floor, 1600, come off the floor and 90 bytes of gradients to come: 20 in layer 3, 120 in layer 2,
    where a chunk of 100 is fetched; it stays, so that there are 120 again in layers 1 and 0. At the last gradient 2080
    bytes are alive, and the update will want 200 more.
    """
    step = Step(6, (4, 0), activations=100, climb=500, gradients=90, below=0, states=400, chunk=100, update=200)
    headroom = BackwardHeadroom(DEVICE)
    assert step.run(headroom) == [], "the first step only watches"
    assert step.numbers.most == 2100
    assert step.run(headroom) == [(2, 100), (1, 100), (0, 100)]
    assert step.numbers.most == 2100


def test_without_checkpointing_there_is_room_for_what_backward_freed() -> None:
    """Four layers keep 500 bytes each and climb 30; layers 3 and 0 train, and the embedding below them.

    Floors from the top: 3000, then with 90 bytes of gradients 2590, 2090, 1590; the peak is 3000 + 30 + 90, and 200
    below it must stay free for the update. In layer 2, with 150 bytes of gradients to come, 2920 - 2590 - 150 are free;
    in layer 1, with a chunk fetched, 580, for what is left of layer 3's states; the last gradient finds 580 again.
    """
    step = Step(4, (3, 0), activations=500, climb=30, gradients=90, below=60, states=600, chunk=100, update=200)
    headroom = BackwardHeadroom(DEVICE)
    assert step.run(headroom) == []
    assert step.numbers.most == 3120
    assert step.run(headroom) == [(2, 100), (1, 500), (0, 500)]
    assert step.numbers.most == 3120


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_what_is_fetched_never_raises_the_peak(data: st.DataObject) -> None:
    def number(least: int, most: int) -> int:
        return data.draw(st.integers(least, most))

    layers = number(1, 8)
    trained = tuple(sorted(data.draw(st.sets(st.integers(0, layers - 1), min_size=1))))
    step = Step(
        layers,
        trained,
        activations=0,
        climb=0,
        gradients=3 * number(0, 100),
        below=data.draw(st.sampled_from([0, 50, 400])),
        states=100 * number(1, 10),
        chunk=100,
        update=number(0, 400),
    )
    a_token, climb_a_token, extra_a_token = number(0, 30), number(0, 30), number(0, 10)
    headroom = BackwardHeadroom(DEVICE)
    for _ in range(4):
        tokens = number(1, 10)
        step.activations, step.climb, step.extra = tokens * a_token, tokens * climb_a_token, tokens * extra_a_token
        alone = replace(step, numbers=Scripted(0, step.numbers.most))
        alone.run(BackwardHeadroom(DEVICE))
        step.run(headroom)
        assert step.numbers.most == alone.numbers.most


def test_a_new_period_watches_again_whatever_passed_before_it() -> None:
    """A probe between two periods runs other layers' backward."""
    step = Step(4, (3, 0), activations=500, climb=30, gradients=90, below=60, states=600, chunk=100, update=0)
    headroom = BackwardHeadroom(DEVICE)
    step.run(headroom)
    fetched = step.run(headroom)
    headroom.new_period()
    step.numbers.now = 3100
    with using(CountedHost(step.numbers)):
        headroom.entering_layer()  # of a pass that ends without a step
        headroom.gradient_ready(stored=0)
    headroom.new_period()
    assert step.run(headroom) == []
    assert step.run(headroom) == fetched != []


def test_however_low_the_floor_is_no_more_is_fetched_than_would_reach_the_peak_now() -> None:
    numbers = Scripted(now=1000, most=1500)
    headroom = BackwardHeadroom(DEVICE)
    with using(CountedHost(numbers)):
        headroom.entering_layer()
        headroom.step_done()
        numbers.now = 100
        headroom.entering_layer()
        assert headroom.bytes(more_to_come=True, gradients=50, update=0) == 1000 - 150
        numbers.now = 1450
        assert headroom.bytes(more_to_come=True, gradients=50, update=0) == 50
        assert headroom.bytes(more_to_come=False, gradients=50, update=20) == 30


def test_where_nobody_counts_there_is_no_headroom() -> None:
    assert current().allocated_bytes(DEVICE) is None
    headroom = BackwardHeadroom(DEVICE)
    headroom.entering_layer()
    headroom.gradient_ready(stored=0)
    headroom.step_done()
    assert headroom.bytes(more_to_come=False, gradients=0, update=0) == 0
