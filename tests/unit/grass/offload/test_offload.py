"""The state offload in every legal order of its queues: no race, no deadlock, and the bits of a run without it.

The bound that `fake_streams` checks, as every queue but `compute` may run ahead or lag: one run of the program speaks
for all interleavings of what it enqueued.
"""

from __future__ import annotations

import copy
import io
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_streams import RecordingStreams, Scripted, install
from further import a_few
from grass_tiny import batch, grass_of, llama
from grass_tiny import train as train_llama
from offload_calls import Calls
from offload_runs import (
    SEEDS,
    SETTINGS,
    STEPS,
    Setting,
    difference,
    expected,
    first_problem,
    on_cpu,
    on_device,
    our_adamw,
    outcome,
    problem_at_end,
    reference,
    torchs_adamw,
    train,
)

from grass.offload.blocks import Block
from grass.offload.offload import StateOffload

KEEP, RESET = Setting(), Setting(state="reset", sampler="importance")


# -------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("seed", a_few(SEEDS, one_in=2))
@pytest.mark.parametrize(
    ("setting", "mode"),
    # how often backward runs matters to what is fetched during it, and to nothing else
    [(s, m) for m in ("resident", "move", "auto") for s in SETTINGS if m == "move" or s.accumulation == "1"],
    ids=str,
)
def test_every_mode_ends_with_the_same_bits_and_without_a_race(
    setting: Setting, mode: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = RecordingStreams(1000 * seed + SETTINGS.index(setting))
    model, opt = on_device(setting, monkeypatch, streams, offload=mode)
    assert first_problem(setting, model, opt, streams) is None
    assert difference(outcome(model, opt), expected(setting)[0]) is None
    assert problem_at_end(opt, streams) is None


@pytest.mark.parametrize("setting", a_few([s for s in SETTINGS if s.accumulation == "2"], one_in=2), ids=str)
def test_grass_is_adamw_over_the_parameters_of_the_active_layers(setting: Setting) -> None:
    mine, active = expected(setting)
    assert len(set(active)) > 2
    assert difference(mine, reference(setting, active, our_adamw(setting))) is None
    if setting.state_dtype == "fp32":
        assert difference(mine, reference(setting, active, torchs_adamw)) is None


def test_chunks_are_fetched_during_backward_in_amounts_that_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests here would not test that."""
    streams = RecordingStreams()
    model, opt = on_device(KEEP, monkeypatch, streams, offload="move")
    amounts = set()
    for step in range(STEPS):
        before = len(streams.copies)
        KEEP.backward(model, opt, step)
        amounts.add(len(streams.copies) - before)
        opt.step()
        opt.zero_grad()
    assert len(amounts) > 3


# -------------------------------------------------------------------------------- odd loops


def interrupted(model: Any, opt: Any, seed: int) -> None:
    """Train, with whatever a loop may do between two steps."""
    chance = random.Random(seed)
    for step in range(STEPS):
        for number in range(chance.randrange(3)):
            data = batch(10_000 * (number + 1) + step)
            what = chance.choice(["skip", "evaluate", "forward", "twice", "retain"])
            if what == "skip":
                model(**data).loss.backward()
                opt.zero_grad()
            elif what == "evaluate":
                model.eval()
                with torch.no_grad():
                    model(**data)
                model.train()
            elif what == "forward":
                model(**data)
            elif what == "twice":
                model(**data).loss.backward()
            else:
                loss = model(**data).loss
                loss.backward(retain_graph=True)
                loss.backward()
        model(**batch(step)).loss.backward()
        if chance.random() < 0.3:
            with torch.no_grad():
                model(**batch(step + 1))
        opt.step()
        opt.zero_grad()


@pytest.mark.parametrize("seed", a_few(SEEDS, one_in=2))
@pytest.mark.parametrize("setting", [KEEP, RESET], ids=str)
@pytest.mark.parametrize("mode", ["resident", "move"])
def test_passes_without_a_step_leave_no_trace(
    mode: str, setting: Setting, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, undisturbed = on_cpu(setting, monkeypatch)
    interrupted(plain, undisturbed, seed)
    streams = RecordingStreams(seed)
    model, opt = on_device(setting, monkeypatch, streams, offload=mode)
    interrupted(model, opt, seed)
    assert difference(outcome(model, opt), outcome(plain, undisturbed)) is None
    assert problem_at_end(opt, streams) is None


def test_a_forward_pass_before_the_step_finds_the_device_free_of_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = RecordingStreams(numbers=Scripted(now=0, most=1 << 20))
    model, opt = on_device(RESET, monkeypatch, streams, offload="move")
    train(RESET, model, opt, 0, 2)
    model(**batch(2)).loss.backward()
    assert streams.live
    loss = model(**batch(3)).loss
    assert not streams.live
    loss.backward()
    assert streams.live, "the second pass is the step's last as far as anybody knows"


def test_layers_that_are_compiled_one_by_one_do_not_compile_the_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = RecordingStreams()
    model, opt = on_device(KEEP, monkeypatch, streams, offload="move")
    for layer in model.model.layers:
        layer.compile(backend="eager")
    assert first_problem(KEEP, model, opt, streams, last=5) is None
    assert difference(outcome(model, opt), expected(KEEP, 5)[0]) is None
    torch._dynamo.reset()


@pytest.mark.parametrize("setting", [KEEP, RESET, replace(RESET, accumulation="2")], ids=str)
def test_the_offload_is_told_how_far_backward_is(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a pass whose step never came, too: layers are final once their own gradients are, all passes done."""
    streams = RecordingStreams(numbers=Scripted(now=0, most=0))
    model, opt = on_device(setting, monkeypatch, streams, offload="move")
    train(setting, model, opt, 0, 1)
    offload = opt.states.offload
    assert offload is not None
    parameters = [p for block in opt.states.awake(opt.active) for p in block.parameters]
    told: list[tuple[int, bool]] = []
    before = 0

    def stored() -> int:
        return sum(p.grad.nbytes for p in parameters if p.grad is not None)

    def entering() -> None:
        nonlocal before
        before = stored()

    def prefetch(blocks: list[Block], *, more_to_come: bool, gradients: int) -> None:
        assert all(p.grad is not None for block in blocks for p in block.parameters)
        assert gradients == sum(p.nbytes for p in parameters) - before
        told.append((len(blocks), more_to_come))

    monkeypatch.setattr(offload.headroom, "entering_layer", entering)
    monkeypatch.setattr(offload, "prefetch", prefetch)
    for _ in range(2):
        told.clear()
        setting.backward(model, opt, 1)
        opt.zero_grad()
        assert told == sorted(told), "one layer after the other"
        assert told[0] == (1, True)
        assert told[-1] == (2, setting.embedding)


def test_a_step_that_was_skipped_does_not_keep_the_next_ones_states_from_being_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    streams = RecordingStreams(numbers=Scripted(now=0, most=1 << 20))
    model, opt = on_device(RESET, monkeypatch, streams, offload="move")
    train(RESET, model, opt, 0, 2)
    fetched = []
    for step in range(2, 5):
        copies = len(streams.copies)
        model(**batch(step)).loss.backward()
        fetched.append(len(streams.copies) - copies)
        opt.zero_grad()
    assert fetched[0] == fetched[1] == fetched[2] > 0


def test_a_group_whose_gradient_was_dropped_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its chunks are on the device by then, and go as the next forward pass begins."""
    streams = RecordingStreams(numbers=Scripted(now=0, most=1 << 20))
    outcomes = []
    for build in (on_cpu, lambda *given, **options: on_device(*given, streams, offload="move", **options)):
        model, opt = build(RESET, monkeypatch, sample_every=6)
        train(RESET, model, opt, 0, 2)
        model(**batch(2)).loss.backward()
        for p in opt.layer_parameters[opt.active[0]]:
            p.grad = None
        opt.step()
        loss = model(**batch(3)).loss
        assert not streams.live
        loss.backward()
        opt.step()
        train(RESET, model, opt, 4, 7)
        outcomes.append(outcome(model, opt))
    assert difference(*outcomes) is None
    assert problem_at_end(opt, streams) is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_recomputed_without_touching_what_was_fetched(
    monkeypatch: pytest.MonkeyPatch, *, reentrant: bool
) -> None:
    streams = RecordingStreams()
    model, opt = on_device(KEEP, monkeypatch, streams, offload="move")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    fetched = []
    for step in range(STEPS):
        copies = len(streams.copies)
        KEEP.backward(model, opt, step)
        fetched.append(len(streams.copies) - copies)
        assert len(streams.live) == fetched[-1]
        opt.step()
        opt.zero_grad()
    assert max(fetched) > 1
    assert difference(outcome(model, opt), expected(KEEP)[0]) is None
    assert problem_at_end(opt, streams) is None


# -------------------------------------------------------------------------------- whatever the order of calls


@pytest.mark.parametrize("seed", [10 * seed + more for seed in SEEDS for more in range(10)])
@pytest.mark.parametrize("mode", ["resident", "move", "auto"])
def test_calls_in_any_order_give_the_same_moments_and_do_not_race(
    mode: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Calls(seed, mode, monkeypatch).run(100) is None


def test_the_offload_asks_its_streams_whether_device_and_host_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    assert not StateOffload([], device, "resident").apart
    install(monkeypatch, RecordingStreams())
    assert StateOffload([], device, "resident").apart


@pytest.mark.parametrize("copy_of", ["pickle", "deepcopy"])
def test_a_copied_or_pickled_model_has_hooks_that_do_nothing(copy_of: str) -> None:
    model = llama()
    opt = grass_of(model, offload="move")
    train_llama(model, opt, 0, 2)
    if copy_of == "pickle":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(model)
    assert opt.states.hooks is not None
    opt.states.hooks._final = [opt.states.blocks[0]]
    assert torch.equal(other(**batch(9)).loss, other(**batch(9)).loss)
    # the optimizer noticed nothing of it, and does of its own model
    assert opt.states.hooks._final
    model(**batch(9))
    assert not opt.states.hooks._final
