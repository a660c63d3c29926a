"""IST against its definition: the authors' code (antgroup/importance-aware-sparse-tuning-IST-paper, ist.py)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations
from typing import Any

import pytest
import torch
from grass_tiny import batch, llama, same, weights
from hand_driven import Driven, assert_caught, watch_backward

from baselines import ist
from baselines.ist import Ist

OPTIONS: dict[str, Any] = {"rank": 4, "alpha": 8}
HALF = {**OPTIONS, "active_share": 0.5}


# ---------------------------------------------------------------- scores


def test_the_first_update_of_the_scores_is_this_worked_example() -> None:
    """on_step_begin: rewards exp(-loss) less their mean, times sigma(s)(1 - sigma(s)) = 1/4 and the rate 10.

    Losses ln 2, ln 4, ln 8 are rewards 1/2, 1/4, 1/8 with mean 7/24: deviations 5/24, -1/24, -4/24, and 10/4 of them.
    """
    losses = [math.log(2), math.log(4), math.log(8)]
    scores = ist.rewarded([0.0, 0.0, 0.0, 0.0], [(0, 1), (1, 2), (2, 3)], losses)
    assert scores == pytest.approx([2.5 * n / 24 for n in (5, 5 - 1, -1 - 4, -4)])


def later_update_differs(rewarded: Callable[..., list[float]]) -> str | None:
    """From scores that are not 0: the slope is of the scores before the measurement, for all three sets."""
    s = 1.5
    slope = math.exp(-s) / (1 + math.exp(-s)) ** 2
    rewards = [0.6, 0.3, 0.3]
    found = rewarded([s, s], [(0,), (0,), (1,)], [-math.log(r) for r in rewards])
    by_hand = [s + 10 * slope * (0.2 - 0.1), s + 10 * slope * -0.1]
    return None if found == pytest.approx(by_hand, rel=1e-12) else f"scores {found}, by hand {by_hand}"


def test_a_layer_in_two_sets_gets_both_rewards_at_the_slope_it_had_before() -> None:
    """on_step_begin: `prob` is computed once, before the loop over the sets."""
    assert later_update_differs(ist.rewarded) is None


def updates_one_by_one(scores: Sequence[float], sets: Any, losses: Sequence[float]) -> list[float]:
    rewards = [math.exp(-loss) for loss in losses]
    updated = list(scores)
    for chosen, reward in zip(sets, rewards, strict=True):
        for layer in chosen:
            p = 1 / (1 + math.exp(-updated[layer]))
            updated[layer] += 10 * (reward - sum(rewards) / len(rewards)) * p * (1 - p)
    return updated


def measured_scores_differ(method_class: type[Ist]) -> str | None:
    """Scores after the first measurement, against losses of models whose B was quartered in the suppressed layers."""
    driven = Driven(method_class, OPTIONS)
    driven.run(0, 10)
    drawn: list[tuple[int, ...]] = []
    sets_of = driven.method._suppressed_sets
    driven.method._suppressed_sets = lambda: drawn.extend(sets_of()) or list(drawn)
    driven.method.set_lr_factor(1.0)
    driven.method.begin_step(10)
    losses = []
    for chosen in drawn:
        other = Driven(Ist, OPTIONS)
        other.module.load_state_dict(driven.module.state_dict())
        with torch.no_grad():
            for name, parameter in other.module.named_parameters():
                if "lora_B" in name and any(f"layers.{layer}." in name for layer in chosen):
                    parameter.mul_(0.25)
            losses.append(float(other.module.eval()(**batch(1000)).loss))
    by_hand = ist.rewarded([0.0] * 4, drawn, losses)
    if len(set(drawn)) != 3 or any(len(chosen) != 2 for chosen in drawn):
        return f"{drawn} are not three distinct halves of four layers"
    found = driven.method.scores
    close = all(math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-9) for a, b in zip(found, by_hand, strict=True))
    return None if close and any(found) else f"scores {found}, by hand {by_hand}"


def test_a_measurement_turns_the_adapters_of_a_set_down_to_a_quarter() -> None:
    """switch_active_adapter: scaling times 0.25; the same as a quarter of B."""
    assert measured_scores_differ(Ist) is None


class SuppressesNothing(Ist):
    def _suppressed(self, layers: Sequence[int]) -> Any:
        return super()._suppressed(())


def test_defect_is_caught_by_the_losses_of_quartered_factors(record_property: Callable[[str, object], None]) -> None:
    assert_caught(SuppressesNothing, measured_scores_differ(SuppressesNothing), record_property)


def test_defect_is_caught_by_the_worked_example(record_property: Callable[[str, object], None]) -> None:
    assert later_update_differs(updates_one_by_one) is not None
    record_property("defect", "updates_one_by_one")
    record_property("caught_by", str(later_update_differs(updates_one_by_one)))


# ---------------------------------------------------------------- a measurement leaves no trace


def trace_is_left(method_class: type[Ist]) -> str | None:
    """What a measurement at step 10 changed beside the scores, if anything."""
    driven = Driven(method_class, {**OPTIONS, "dropout": 0.1})
    driven.run(0, 10)
    scales = [dict(scaling) for layer in driven.method.scalings for scaling in layer]
    before, random = weights(driven.module), torch.get_rng_state()
    driven.method.begin_step(10)
    if [dict(scaling) for layer in driven.method.scalings for scaling in layer] != scales:
        return "a scale is not what it was"
    if not torch.equal(torch.get_rng_state(), random):
        return "random numbers were drawn from torch's own generator"
    if not all(module.training for module in driven.module.modules()):
        return "the model is left in evaluation mode"
    if not same(weights(driven.module), before) or any(p.grad is not None for p in driven.module.parameters()):
        return "weights or gradients changed"
    return None if driven.method.measured_at == 10 else "nothing was measured"


def test_a_measurement_changes_the_scores_and_nothing_else() -> None:
    """active_all_adapter, model.train(): and the code's inference_mode keeps gradients away."""
    assert trace_is_left(Ist) is None


def test_scales_are_restored_when_a_forward_pass_fails() -> None:
    driven = Driven(Ist, OPTIONS)

    def fails() -> None:
        with driven.method._suppressed((0, 2)):
            assert [layer[0]["default"] for layer in driven.method.scalings] == [0.5, 2.0, 0.5, 2.0]
            raise MemoryError

    with pytest.raises(MemoryError):
        fails()
    assert {scale for layer in driven.method.scalings for scaling in layer for scale in scaling.values()} == {2.0}


class NeverRestoresTheScale(Ist):
    @contextmanager
    def _suppressed(self, layers: Sequence[int]) -> Iterator[None]:
        for layer in layers:
            for scaling in self.scalings[layer]:
                scaling["default"] *= 0.25
        yield


class StaysInEvaluationMode(Ist):
    def _measure(self) -> None:
        super()._measure()
        self.wrapped.eval()


@pytest.mark.parametrize("broken", [NeverRestoresTheScale, StaysInEvaluationMode])
def test_defect_is_caught_by_its_trace(broken: type[Ist], record_property: Callable[[str, object], None]) -> None:
    assert_caught(broken, trace_is_left(broken), record_property)


# ---------------------------------------------------------------- which layers train


def inclusion(probability: Sequence[float], count: int) -> list[float]:
    """Chance of each layer to be among `count` successive draws without replacement, by enumeration."""
    chance = [0.0] * len(probability)
    for order in permutations(range(len(probability)), count):
        p, left = 1.0, 1.0
        for layer in order:
            p, left = p * probability[layer] / left, left - probability[layer]
        for layer in order:
            chance[layer] += p
    return chance


def law_differs(method_class: type[Ist]) -> str | None:
    """Over 3000 draws of two of four layers with known scores: how often each layer was in, against its chance."""
    driven = Driven(method_class, {**HALF, "measure_every": 10**9})
    scores = [2.0, 0.5, 0.0, -1.0]
    driven.method.scores = list(scores)
    counts = [0] * 4
    for step in range(3000):
        driven.method.begin_step(step)
        for layer in driven.method.active:
            counts[layer] += 1
    odds = [1 / (1 + math.exp(s)) for s in scores]
    chance = inclusion([o / sum(odds) for o in odds], 2)
    worst = max(abs(n - 3000 * p) / math.sqrt(3000 * p * (1 - p)) for n, p in zip(counts, chance, strict=True))
    expected = [round(3000 * p) for p in chance]
    return None if worst < 4.5 else f"layers drawn {counts} times, {expected} expected (z = {worst:.1f})"


def test_layers_are_drawn_without_replacement_with_weights_sigmoid_of_minus_the_score() -> None:
    """sampling_more_important_selection: torch.multinomial of (-importance_score).sigmoid(), without replacement."""
    assert law_differs(Ist) is None


class DrawsTheUnimportant(Ist):
    @property
    def probability(self) -> list[float]:
        odds = [1 / (1 + math.exp(-s)) for s in self.scores]
        return [o / sum(odds) for o in odds]


def test_defect_is_caught_by_counting_draws(record_property: Callable[[str, object], None]) -> None:
    assert_caught(DrawsTheUnimportant, law_differs(DrawsTheUnimportant), record_property)


def test_a_quarter_of_the_layers_trains_and_moments_of_sleeping_adapters_stay() -> None:
    """switch_active_layers: int(0.25 L) layers; the callback never touches the optimizer."""
    driven = Driven(Ist, OPTIONS)
    visited: set[int] = set()
    for step in range(12):
        sleeping = {p: m["exp_avg"].clone() for p, m in driven.method.optimizer.state.items()}
        before = weights(driven.module)
        driven.run(step, step + 1)
        (active,) = driven.method.active
        visited.add(active)
        after = weights(driven.module)
        moved = {name.split(".layers.")[1][0] for name in after if not torch.equal(before[name], after[name])}
        assert moved == {str(active)}
        own = driven.method.adapters[active]
        assert all(torch.equal(driven.method.optimizer.state[p]["exp_avg"], m)
                   for p, m in sleeping.items() if not any(p is q for q in own))  # fmt: skip
    assert len(visited) > 1
    assert set(driven.method.optimizer.state) == {p for layer in visited for p in driven.method.adapters[layer]}


def test_scores_are_measured_at_every_tenth_step_but_the_first_and_the_control_never_measures() -> None:
    """on_step_begin: `global_step % 10 == 0 and global_step > 0`; the readme's RST is uniform."""
    driven = Driven(Ist, OPTIONS)
    measured = []
    for step in range(31):
        driven.run(step, step + 1)
        if driven.method.measured_at == step:
            measured.append(step)
    assert measured == [10, 20, 30]
    trace = driven.method.trace()
    assert trace.importance == tuple(-s for s in driven.method.scores)
    assert trace.importance is not None
    # the likelier layer is the more important one
    assert sorted(range(4), key=trace.importance.__getitem__) == sorted(range(4), key=trace.probability.__getitem__)
    control = Driven(Ist, {**OPTIONS, "choice": "uniform"})
    control.run(0, 31)
    assert control.method.trace().importance is None
    assert control.method.trace().probability == (0.25,) * 4


def test_every_measurement_has_a_batch_of_its_own() -> None:
    """on_step_begin: `next(self.dataloader)`."""
    driven = Driven(Ist, {**OPTIONS, "measure_every": 2}, batch_size=4)
    seen: list[int] = []
    loss = driven.method.calibration.loss
    batches = [batch(1000 + number)["input_ids"] for number in range(20)]
    number_of = lambda b: next(i for i, ids in enumerate(batches) if torch.equal(ids, b["input_ids"]))  # noqa: E731
    driven.method.calibration.loss = lambda model, b: (seen.append(number_of(b)), loss(model, b))[1]
    driven.run(0, 7)
    # three measurements, each of two micro-batches under three suppressed sets
    assert seen == [0, 1] * 3 + [2, 3] * 3 + [4, 5] * 3


def test_backward_stops_at_the_lowest_drawn_layer_under_checkpointing_too() -> None:
    """Ours: peft puts on the hook of transformers' re-entrant checkpointing, which this kind does not need."""
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    driven = Driven(Ist, OPTIONS, model=model)
    visited = watch_backward(model)
    lowest = set()
    for step in range(6):
        visited.clear()
        driven.run(step, step + 1)
        assert visited == set(range(driven.method.active[0], 4))
        lowest.add(driven.method.active[0])
    assert lowest - {0}
