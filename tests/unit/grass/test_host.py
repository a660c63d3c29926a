"""The seam: which host is in force, and that one put around another changes nothing that it does not mean to."""

from __future__ import annotations

import contextlib
import inspect
import threading
from typing import Any

import pytest
import torch
from grass_tiny import llama, train

from grass import Grass
from grass.host import Host, HostAround, current, using
from grass.sampling import LayerSampler, draw_layers


class Lowest(Host):
    """Never leaves a draw to chance."""

    def draw(self, layers: int, count: int, by_chance: Any) -> tuple[int, ...]:
        return tuple(range(count))


def test_the_innermost_host_is_in_force_until_its_block_ends_however_it_ends() -> None:
    usual, outer, inner = current(), Host(), Host()
    with using(outer):
        with contextlib.suppress(KeyError), using(inner):
            assert current() is inner
            raise KeyError
        assert current() is outer
    assert current() is usual


def test_threads_that_began_before_get_the_host_in_force() -> None:
    """As autograd's do, which run hooks of a CUDA backward."""
    asked, answered, seen = threading.Event(), threading.Event(), []

    def thread() -> None:
        asked.wait(10)
        seen.append(current())
        answered.set()

    waiting = threading.Thread(target=thread)
    waiting.start()
    host = Host()
    with using(host):
        asked.set()
        assert answered.wait(10)
    waiting.join()
    assert seen == [host]


QUESTIONS = [name for name, value in vars(Host).items() if inspect.isfunction(value)]


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_host_around_another_hands_every_question_on(question: str) -> None:
    given: dict[str, Any] = {}
    answer = object()

    class Inner(Host):
        pass

    def answers(self: Inner, *arguments: Any, **named: Any) -> object:
        given.update(zip(parameters, arguments, strict=False), **named)
        return answer

    parameters = list(inspect.signature(getattr(Host(), question)).parameters.values())
    keywords = {p.name: object() for p in parameters if p.kind is p.KEYWORD_ONLY}
    positional = [object() for p in parameters if p.kind is not p.KEYWORD_ONLY]
    setattr(Inner, question, answers)
    assert getattr(HostAround(Inner()), question)(*positional, **keywords) is answer
    assert [*given.values()] == [*positional, *keywords.values()]


def test_the_usual_host_reads_what_is_there() -> None:
    host, device = Host(), torch.device("cpu")
    assert host.number(torch.tensor(0.5)) == 0.5
    assert host.numbers(torch.tensor([1, 2])) == [1.0, 2.0]
    assert host.has_values(torch.ones(1))
    assert not host.has_values(torch.ones(1, device="meta"))
    assert host.allocated_bytes(device) is host.peak_bytes(device) is host.obtainable_bytes(device) is None


@pytest.mark.parametrize("kind", ["uniform", "fixed", "age", "cyclic"])
def test_a_host_decides_every_draw_and_no_random_number_is_used_up(kind: Any) -> None:
    sampler = LayerSampler(kind, layers=6, active_layers=2, seed=0)
    before = sampler.generator.get_state()
    with using(Lowest()):
        assert [sampler.draw(steps=step, trained=()) for step in range(3)] == [(0, 1)] * 3
        assert draw_layers([0.0, 0.0, 1.0], 1, sampler.generator) == (0,)
    assert torch.equal(sampler.generator.get_state(), before)
    with pytest.raises(ValueError, match="from 1 to 3"), using(Lowest()):
        draw_layers([1.0] * 3, 4, sampler.generator)


def test_an_optimizer_trains_what_the_host_draws() -> None:
    model = llama()
    with using(Lowest()):
        opt = Grass(model, lr=1e-2, active_layers=2, sample_every=1, sampler="uniform")
        train(model, opt, 0, 3)
    assert [record.active for record in opt.history] == [(0, 1)] * 3
