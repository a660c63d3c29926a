"""HiFT against its definition (arXiv 2401.15207, and misonsky/HiFT): groups in turn, kept moments, a delayed rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from grass_tiny import batch, llama, same, weights
from hand_driven import LR, Driven, assert_caught, watch_backward
from torch import Tensor

from baselines.full import Full
from baselines.hift import Hift

UNITS = 6
"""Of the tiny Llama: embedding, four layers, head with final norm."""


def unit_of(name: str) -> int:
    """Unit of a parameter of the tiny Llama."""
    if ".layers." in name:
        return 1 + int(name.split(".")[2])
    return 0 if "embed" in name else UNITS - 1


def moved_units(driven: Driven, steps: int) -> list[set[int]]:
    """Units that changed in each step; a unit whose tensors did not all change is not among them."""
    found = []
    for step in range(steps):
        before = weights(driven.model)
        driven.run(step, step + 1)
        changed = {name for name, w in weights(driven.model).items() if not torch.equal(w, before[name])}
        units = {unit_of(name) for name in changed}
        assert changed == {name for name in before if unit_of(name) in units}
        found.append(units)
    return found


# ---------------------------------------------------------------- groups


def sweeps_differ(method_class: type[Hift], order: str, units: int, turns: list[set[int]] | None) -> str | None:
    """Three sweeps: every unit trains exactly once in each, always in the same turn, which may be given."""
    driven = Driven(method_class, {"group_units": units, "order": order})
    length = math.ceil(UNITS / units)
    moved = moved_units(driven, 3 * length)
    first = moved[:length]
    if sorted(unit for group in first for unit in group) != list(range(UNITS)):
        return f"units {first} trained in the first sweep"
    if moved != first * 3:
        return f"the order changed: {moved}"
    return None if turns is None or first == turns else f"units came as {first}, not as {turns}"


@pytest.mark.parametrize(
    ("order", "units", "turns"),
    [
        ("bottom-up", 1, [{0}, {1}, {2}, {3}, {4}, {5}]),
        ("top-down", 1, [{5}, {4}, {3}, {2}, {1}, {0}]),
        ("bottom-up", 2, [{0, 1}, {2, 3}, {4, 5}]),
        ("top-down", 4, [{5, 4, 3, 2}, {1, 0}]),
        ("random", 1, None),
        ("random", 4, None),
    ],
)
def test_each_unit_is_updated_exactly_once_a_sweep(order: str, units: int, turns: list[set[int]] | None) -> None:
    """registerCallBack.py, group_model: down2up, up2down, or shuffled once; trainer.py, select_element: in a queue."""
    assert sweeps_differ(Hift, order, units, turns) is None


def test_the_random_order_follows_the_seed() -> None:
    """registerCallBack.py: `random.shuffle`, which has no seed of its own there."""
    orders = {tuple(Driven(Hift, {"order": "random"}, seed=seed).method._order(UNITS)) for seed in range(20)}
    assert len(orders) > 10


class SkipsTheFinalNorm(Hift):
    def attach(self, model: Any) -> Any:
        attached = super().attach(model)
        self.groups = [[p for p in group if p is not model.model.norm.weight] for group in self.groups]
        return attached


class GoesBackAndForth(Hift):
    def end_step(self, replay: Any) -> Any:
        facts = super().end_step(replay)
        if self.position == 0:
            self.groups.reverse()
        return facts


@pytest.mark.parametrize("broken", [SkipsTheFinalNorm, GoesBackAndForth])
def test_defect_is_caught_by_the_sweeps(broken: type[Hift], record_property: Callable[[str, object], None]) -> None:
    try:
        detail = sweeps_differ(broken, "bottom-up", 1, None)
    except AssertionError:
        detail = "a unit's tensors did not all move"
    assert_caught(broken, detail, record_property)


def test_of_a_tied_model_embedding_head_and_final_norm_are_one_unit() -> None:
    """Ours: one tensor has one turn a sweep."""
    driven = Driven(Hift, {}, model=llama(tied=True))
    assert driven.method.layers == [(), (0,), (1,), (2,), (3,)]
    assert {driven.method.names[id(p)] for p in driven.method.groups[0]} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
    }


def test_all_units_in_one_group_are_full_fine_tuning_to_the_last_bit() -> None:
    """A sweep is one step then, so that no rate is delayed."""
    one, full = Driven(Hift, {"group_units": 6}, weight_decay=0.01), Driven(Full, {}, weight_decay=0.01)
    for driven in (one, full):
        driven.run(0, 10, factor=lambda step: 1 - step / 20)
    assert same(weights(one.model), weights(full.model))


# ---------------------------------------------------------------- moments and the delayed rate


def weights_differ(method_class: type[Hift]) -> str | None:
    """Three sweeps against AdamW in float64, moments and count of every tensor kept, the rate that of its sweep."""
    driven = Driven(method_class, {}, weight_decay=0.1)
    expected = {name: w.double() for name, w in weights(driven.model).items()}
    state: dict[str, tuple[Tensor, Tensor, int]] = {}

    def schedule(step: int) -> float:
        return 1 - step / 20

    def by_hand(step: int) -> None:
        lr = LR * schedule(step - step % UNITS)
        for name, parameter in driven.model.named_parameters():
            if parameter.grad is None:
                continue
            g = parameter.grad.double()
            first, second, count = state.get(name, (torch.zeros_like(g), torch.zeros_like(g), 0))
            first, second, count = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g, count + 1
            state[name] = (first, second, count)
            denominator = (second / (1 - 0.999**count)).sqrt() + 1e-8
            expected[name] = expected[name] * (1 - lr * 0.1) - lr * (first / (1 - 0.9**count)) / denominator

    driven.run(0, 3 * UNITS, factor=schedule, look=by_hand)
    for name, w in weights(driven.model).items():
        gap = float((w.double() - expected[name]).abs().max())
        if gap > 2e-5:
            return f"{name} ended {gap:.1e} away from AdamW with kept moments and a delayed rate"
    return None


def test_moments_persist_and_a_sweep_has_one_rate() -> None:
    """trainer.py, update_parameter_state (rate captured once a sweep); torchAdamw.py (moments come back)."""
    assert weights_differ(Hift) is None


def test_the_delayed_rate_is_this_worked_example() -> None:
    """The same: of a rate that falls by a tenth a step six groups have the first value, the next six the seventh."""
    driven = Driven(Hift, {})
    rates = []
    for step in range(13):
        driven.run(step, step + 1, factor=lambda s: 2.0 - s / 10)
        rates.append({group["lr"] / LR for group in driven.method.optimizer.param_groups})
    assert [list(r) for r in rates] == [[pytest.approx(2.0)]] * 6 + [[pytest.approx(1.4)]] * 6 + [[pytest.approx(0.8)]]


class FollowsTheScheduleAtEveryStep(Hift):
    def set_lr_factor(self, factor: float) -> None:
        place, self.position = self.position, 0
        super().set_lr_factor(factor)
        self.position = place


class LosesTheMoments(Hift):
    def end_step(self, replay: Any) -> Any:
        facts = super().end_step(replay)
        self.optimizer.state.clear()
        return facts


@pytest.mark.parametrize("broken", [FollowsTheScheduleAtEveryStep, LosesTheMoments])
def test_defect_is_caught_by_float64_arithmetic(
    broken: type[Hift], record_property: Callable[[str, object], None]
) -> None:
    assert_caught(broken, weights_differ(broken), record_property)


def test_a_group_is_chosen_for_an_optimizer_step_and_not_for_a_micro_batch() -> None:
    """trainer.py chooses in `training_step`, once a micro-batch; the paper's algorithm 1 once an update."""
    driven = Driven(Hift, {})
    for step in range(UNITS):
        driven.method.begin_step(step)
        for micro in range(3):
            driven.method.backward(driven.module(**batch(3 * step + micro)).loss / 3, last=micro == 2)
            graded = {unit_of(name) for name, p in driven.model.named_parameters() if p.grad is not None}
            assert graded == {step}
        driven.method.end_step(lambda: iter(()))


def test_backward_stops_at_the_lowest_unit_of_the_group_under_checkpointing_too() -> None:
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    driven = Driven(Hift, {}, model=model)
    visited = watch_backward(model)
    for step, layers in enumerate([range(4), range(4), range(1, 4), range(2, 4), range(3, 4), ()]):
        visited.clear()
        driven.run(step, step + 1)
        assert visited == set(layers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_moments_are_on_the_host_but_for_the_update() -> None:
    """torchAdamw.py, step: `.to(p)` before the update, `.to("cpu")` after it."""
    driven = Driven(Hift, {}, model=llama().cuda(), device="cuda")
    places: list[set[str]] = []
    update = driven.method.optimizer.step

    def watched() -> None:
        places.append({m["exp_avg"].device.type for m in driven.method.optimizer.state.values()})
        update()

    driven.method.optimizer.step = watched
    for step in range(2 * UNITS):
        driven.method.begin_step(step)
        driven.module(**{key: value.cuda() for key, value in batch(step).items()}).loss.backward()
        driven.method.end_step(lambda: iter(()))
        assert {m["exp_avg"].device.type for m in driven.method.optimizer.state.values()} == {"cpu"}
    assert places[UNITS:] == [{"cpu", "cuda"}] * UNITS
