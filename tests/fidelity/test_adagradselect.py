"""AdaGradSelect (arXiv 2512.15764), by our reading, against its definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from grass_tiny import batch, llama
from rival_steps import Hand, adam64

from baselines.adagradselect import AdaGradSelect

BLOCKS = 7
"""Of the tiny Llama: four layers, embedding, final norm, head; 3 of them are 43 %."""


class OneBatch:
    def batches(self, count: int) -> Any:
        return (batch(-1 - n) for n in range(count))

    def loss(self, model: Any, given: Any) -> Any:
        return model(**given).loss


def hand(method_class: type[AdaGradSelect] = AdaGradSelect, *, recipe: Any = None, **options: Any) -> Hand:
    driven = Hand(method_class, {"blocks_share": 0.43, **options}, seed=1, **(recipe or {}))
    driven.method.prepare(OneBatch())
    return driven


def norms_by_hand(method: Any, weights: dict[str, torch.Tensor], batches: list[int]) -> list[float]:
    """Root over the batches' summed squares of each block's whole gradient, all gradients at once, in float64."""
    squares = [0.0] * BLOCKS
    for number in batches:
        model = llama()
        model.load_state_dict(weights)
        (model(**batch(number)).loss / len(batches)).backward()
        for block, parameters in enumerate(method.blocks):
            own = [model.get_parameter(method.names[id(p)]).grad for p in parameters]
            squares[block] += sum(float(g.double().square().sum()) for g in own)
    return [math.sqrt(square) for square in squares]


def exploring_differs(method_class: type[AdaGradSelect]) -> str | None:
    """Section on exploring: the k % blocks of largest accumulated norm, of all blocks, trained or not."""
    driven = hand(method_class, epsilon=1.0, decay=0.0, explore_steps=99, recipe={"batch_size": 4})
    method = driven.method
    accumulated = norms_by_hand(method, driven.start, [-1])
    for number in range(4):
        before = driven.weights()
        seen = driven.step(number)
        largest = sorted(sorted(range(BLOCKS), key=lambda b: -accumulated[b])[:3])
        if list(method.active) != largest:
            return f"step {number}: blocks {method.active}, by hand {largest}"
        new = norms_by_hand(method, before, [number * 10, number * 10 + 1])
        accumulated = [old + norm for old, norm in zip(accumulated, new, strict=True)]
        if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(method.accumulated, accumulated, strict=True)):
            return f"step {number}: norms {method.accumulated}, by hand {accumulated}"
        named = {method.names[id(p)] for block in largest for p in method.blocks[block]}
        if set(seen.gradients) != named:
            return f"step {number}: gradients of {sorted(set(seen.gradients) ^ named)[:3]}"
    return None


def test_exploring_takes_the_largest_accumulated_norms_of_all_blocks() -> None:
    assert exploring_differs(AdaGradSelect) is None


class SeesOnlyWhatTrains(AdaGradSelect):
    """A public port's fault: norms of unfrozen blocks only, so that exploring re-picks the current set."""

    def _add_measured(self) -> None:
        for block in range(len(self.blocks)):
            if block not in self.active:
                self.squares[block] = 0
        super()._add_measured()


class KeepsAllGradients(AdaGradSelect):
    def _measure_all(self) -> None:
        active, self.active = self.active, tuple(range(len(self.blocks)))
        super()._measure_all()
        self.active = active


@pytest.mark.parametrize("broken", [SeesOnlyWhatTrains, KeepsAllGradients])
def test_a_broken_measurement_is_caught(broken: type[AdaGradSelect]) -> None:
    assert exploring_differs(broken) is not None


def test_an_exploring_step_never_holds_two_gradients_of_blocks_that_sleep() -> None:
    driven = hand(epsilon=1.0, decay=0.0, explore_steps=99)
    method = driven.method
    alive: list[int] = []

    def count(_: Any) -> None:
        asleep = [p for b, parameters in enumerate(method.blocks) if b not in method.active for p in parameters]
        alive.append(sum(p.grad is not None for p in asleep))

    for parameter in driven.model.parameters():
        parameter.requires_grad_(True)
        parameter.register_post_accumulate_grad_hook(count)
    driven.step(0)
    assert len(alive) == len(list(driven.model.parameters()))
    assert max(alive) == 1


def test_the_chance_of_exploring_decays_and_ends_with_the_first_epoch() -> None:
    """eps_t = eps_0 exp(-lambda t) in epoch 1, 0 after: 300 seeds at t = 0, 50 and beyond."""
    method, shares = hand(epsilon=0.8, decay=0.02, explore_steps=100).method, {}
    for step in (0, 50, 100):
        explored = 0
        for seed in range(300):
            method.generator.manual_seed(seed)
            method.begin_step(step)
            explored += method.exploring
            method._add_measured()
        shares[step] = explored / 300
    # standard errors are 0.023 and 0.026
    assert shares[0] == pytest.approx(0.8, abs=0.1)
    assert shares[50] == pytest.approx(0.8 * math.exp(-1), abs=0.11)
    assert shares[100] == 0


MODEL = llama()


def test_the_draw_is_dirichlet_over_counts_and_delta() -> None:
    """Dirichlet(f + delta): mean (f + delta) / sum, variance mean (1 - mean) / (sum + 1), in 4,000 draws."""
    method = hand(delta=0.5).method
    method.counts = [0, 1, 2, 5, 10, 0, 20]
    drawn = torch.tensor([method._dirichlet() for _ in range(4000)], dtype=torch.float64)
    p = drawn / drawn.sum(1, keepdim=True)
    concentration = torch.tensor(method.counts, dtype=torch.float64) + 0.5
    mean = concentration / concentration.sum()
    variance = mean * (1 - mean) / (concentration.sum() + 1)
    assert torch.all((p.mean(0) - mean).abs() < 4.5 * (variance / 4000).sqrt())
    # the variance's own standard error is 5 to 15 % for shapes this skewed
    assert torch.allclose(p.var(0), variance, rtol=0.35)


def test_exploiting_trains_the_largest_of_the_draw() -> None:
    driven = hand(epsilon=0.0)
    method = driven.method
    state = method.gamma.getstate()
    values = method._dirichlet()
    method.gamma.setstate(state)
    method.begin_step(0)
    assert list(method.active) == sorted(sorted(range(BLOCKS), key=lambda b: -values[b])[:3])
    assert not method.exploring


def test_as_counts_grow_the_set_freezes_on_one_that_chance_picked() -> None:
    """A Dirichlet's spread falls as 1 / sqrt(sum f): who is drawn is counted, and leads. No gradient has a say.

    With exploring switched off, 600 steps: the first 20 try several sets, the last 100 train a single one, which
    differs between seeds, and the blocks left out have trained in fewer than 2 % of the steps.
    """
    ends = set()
    for seed in range(6):
        method = Hand(AdaGradSelect, {"blocks_share": 0.43, "epsilon": 0.0}, seed=seed, model=MODEL).method
        sets = []
        for step in range(600):
            method.begin_step(step)
            for block in method.active:
                method.counts[block] += 1
            sets.append(method.active)
        assert len(set(sets[:20])) >= 3
        (end,) = set(sets[-100:])
        assert all(method.counts[block] < 12 for block in range(BLOCKS) if block not in end)
        ends.add(end)
    assert len(ends) > 3


def test_the_control_keeps_the_most_chosen_blocks_after_the_first_epoch() -> None:
    method = hand(epsilon=0.0, explore_steps=20, later="most_chosen").method
    for step in range(20):
        method.begin_step(step)
        for block in method.active:
            method.counts[block] += 1
    wanted = tuple(sorted(sorted(range(BLOCKS), key=lambda b: (-method.counts[b], b))[:3]))
    for step in range(20, 40):
        method.begin_step(step)
        assert method.active == wanted


def test_blocks_take_adamw_steps_with_moments_that_survive_sleep() -> None:
    """Every block has its own step count; the moments of a sleeping one wait unchanged (paper: kept on the CPU)."""
    driven = hand(epsilon=0.5, decay=0.0, explore_steps=99, recipe={"weight_decay": 0.1})
    weights = {name: w.double() for name, w in driven.start.items()}
    states: dict[str, dict[str, Any]] = {}
    for number in range(12):
        seen = driven.step(number)
        for name, gradient in seen.gradients.items():
            state = states.setdefault(name, {})
            weights[name] = adam64(weights[name], gradient, state, lr=driven.lr, decay=0.1)
    assert max(float((seen.weights[n].double() - weights[n]).abs().max()) for n in weights) < 2e-5
    assert len({state["t"] for state in states.values()}) > 1


def test_moments_are_on_the_device_for_the_update_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of what trains come before the update and go after it (paper: evicted); no others move."""
    driven = hand(epsilon=0.0)
    calls: list[Any] = []
    move, update = AdaGradSelect._move_moments, driven.method.optimizer.step

    def moves(method: Any, parameters: Any, *, to_host: bool) -> None:
        calls.append((to_host, {id(p) for p in parameters}))
        move(method, parameters, to_host=to_host)

    monkeypatch.setattr(AdaGradSelect, "_move_moments", moves)
    monkeypatch.setattr(driven.method.optimizer, "step", lambda: (calls.append("update"), update()))
    for number in range(3):
        calls.clear()
        driven.step(number)
        training = {id(p) for block in driven.method.active for p in driven.method.blocks[block]}
        assert calls == [(False, training), "update", (True, training)]


def test_a_tied_head_is_no_block_of_its_own() -> None:
    method = Hand(AdaGradSelect, {}, model=llama(tied=True)).method
    assert len(method.blocks) == 6
