"""BlockLLM (arXiv 2406.17296; blockllm_torch/blockllm.py of RAmruthaVignesh/blockllm) against its definition."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from grass_tiny import batch, llama
from rival_steps import Hand, adam64, facts_of_llama, recipe_of

from baselines.blockllm import BlockLLM, BlockLLMOptions

CODE = {"variant": "code", "sparsity": 0.5, "update_freq": 4, "patience": 2, "probe_every": 2}


class OneBatch:
    """A calibration of one batch."""

    def batches(self, count: int) -> Any:
        return (batch(-1 - n) for n in range(count))

    def loss(self, model: Any, given: Any) -> Any:
        return model(**given).loss


def hand(options: dict[str, Any], method_class: type[BlockLLM] = BlockLLM, **recipe: Any) -> Hand:
    driven = Hand(method_class, options, **recipe)
    driven.method.prepare(OneBatch())
    return driven


def given_norms(method: Any, norms: dict[int, float]) -> None:
    method.norms = {i: torch.tensor(norm) for i, norm in norms.items()}


def test_the_code_takes_the_largest_norms_until_the_next_would_fill_the_share() -> None:
    """_adjust_parameters: sorted by norm, descending; stops *before* the tensor whose count reaches the share.

    A layer has q 256, k 128, v 128, o 256, gate, up, down 512, two norms of 16; half of 9,360 is 4,680.
    """
    method = hand(CODE).method
    norms = {i: 1.0 + i / 100 for i in range(37)}
    norms[0], norms[4] = 9.0, 8.0
    given_norms(method, norms)
    method._choose_by_norm(100)
    assert [method.names[i].split(".")[-2] for i in (0, 4, 36)] == ["q_proj", "gate_proj", "norm"]
    # q and gate of layer 0 (768), then down from the top: final norm 16, layer 3 (2,336), and of layer 2 two norms and
    # down, up (1,056) = 4,176; gate would make 4,688
    assert method.pending == (0, 4, 23, 24, 25, 26, *range(27, 37))
    assert sum(method.tensors[i].numel() for i in method.pending) == 768 + 16 + 2336 + 1056


def test_where_too_few_tensors_were_measured_random_ones_fill_the_share() -> None:
    """_adjust_parameters: "while running_param_count < num_params_to_keep" draws from all."""
    method = hand(CODE).method
    given_norms(method, {0: 1.0, 9: 2.0})
    method._choose_by_norm(100)
    trained = sum(method.tensors[i].numel() for i in method.pending)
    assert {0, 9} <= set(method.pending)
    assert 4680 <= trained < 4680 + 512


def visit_damping_acts(method_class: type[BlockLLM]) -> bool:
    """Whether a tensor that was always chosen ever gives way to one whose norm is a fiftieth smaller."""
    method = hand({**CODE, "sparsity": 0.9}, method_class).method
    for choice in range(1, 200):
        given_norms(method, {4: 1.0, 13: 0.98, 22: 0.5})  # the gates of layers 0, 1, 2: one fits beside no other
        method._choose_by_norm(100 * choice)
        if method.pending[0] != 4:
            return True
    return False


def test_the_codes_damping_by_visits_is_inert() -> None:
    """Score = norm / exp(visits / step): normalised visits over 100 steps change it by a hundredth at most."""
    assert not visit_damping_acts(BlockLLM)


class DampsByCounts(BlockLLM):
    """The damping as the paper means it."""

    def _choose_by_norm(self, steps: int) -> None:
        self.counts = getattr(self, "counts", [0] * len(self.tensors))
        self.norms = {i: norm / (1 + self.counts[i]) for i, norm in self.norms.items()}
        super()._choose_by_norm(steps)
        for i in self.pending or ():
            self.counts[i] += 1


def test_a_damping_that_acts_is_caught() -> None:
    assert visit_damping_acts(DampsByCounts)


def test_the_codes_visits_are_normalised_after_every_single_increment() -> None:
    """_update_param_visit_frequency: start at 1/37 each; add 1 to one tensor, divide all by the sum, then the next."""
    method = hand({**CODE, "sparsity": 0.88}).method
    given_norms(method, {4: 1.0, 9: 0.9, 1: 0.8, 2: 0.7})  # gate 512, q 256, k 128, v 128: 1,024 of 1,123
    method._choose_by_norm(100)
    chosen = [i for i in method.pending if i in (1, 2, 4, 9)]
    assert chosen == [1, 2, 4, 9]
    visits = [1 / 37] * 37
    for i in method.pending:
        visits[i] += 1
        visits = [v / sum(visits) for v in visits]
    assert method.visits == pytest.approx(visits)


@pytest.mark.parametrize(
    ("losses", "again"),
    [
        ([3.0, 2.0, 1.0, 1.5], False),
        ([1.0, 1.0, 2.0, 2.0], True),
        ([1.0, 1.0, 1.0, 1.0], False),
        ([9.0, 9.0], False),
    ],
    ids=["falls", "rises", "flat", "no more losses than patience"],
)
def test_the_code_chooses_again_only_if_recent_losses_exceed_all(losses: list[float], again: bool) -> None:
    """_should_adjust_parameters: mean of the last 2 above the mean since the last re-choice, at multiples of 4 only."""
    driven = hand(CODE)
    driven.step(0)
    method = driven.method
    before = method.active
    for step in (1, 2, 3):
        method.history = list(losses)
        method.begin_step(step)
        assert method.choices == 0
    method.history = list(losses)
    method.begin_step(4)
    assert method.choices == int(again)
    assert (method.history == []) is again
    assert (method.active == before) is not again


def test_losses_are_summed_over_micro_batches() -> None:
    driven = hand(CODE, batch_size=4, micro_batch_size=2)
    with torch.no_grad():
        losses = [float(driven.model(**batch(n)).loss) for n in (0, 1)]
    driven.step(0)
    assert driven.method.history == pytest.approx([sum(losses) / 2])


def test_while_the_loss_falls_the_set_stays_and_a_rise_drops_all_moments() -> None:
    """The same batch over and over falls; ten times the rate with the sign turned makes it rise."""
    driven = hand(CODE, steps=40)
    method = driven.method
    for number in range(12):
        method.set_lr_factor(1.0)
        method.begin_step(number)
        method.backward(driven.model(**batch(0)).loss, last=True)
        method.end_step(lambda: iter(()))
    assert method.choices == 0
    counted = {state["step"] for state in method.optimizer.state.values()}
    assert counted == {12}
    method.history[-2:] = [99.0, 99.0]
    method.begin_step(12)
    assert method.choices == 1
    assert len(method.optimizer.state) == 0
    assert method.optimizer.param_groups[0]["lr"] == driven.lr


def test_the_probed_tensor_is_measured_and_never_updated() -> None:
    """step: one random inactive tensor has a gradient for 20 steps (here 2); its norm is recorded, it never moves."""
    driven = hand(CODE, batch_size=4, micro_batch_size=2)
    probed = Counter[int]()
    list(driven.steps(2))
    for number in range(2, 4):
        before = driven.weights()
        seen = driven.step(number)
        probe = driven.method.probe
        assert probe is not None
        assert probe not in driven.method.active
        probed[probe] += 1
        name = driven.method.names[probe]
        assert name not in seen.gradients
        assert torch.equal(seen.weights[name], before[name])
        model = llama()
        model.load_state_dict(before)
        (model(**batch(number * 10)).loss / 2).backward()
        (model(**batch(number * 10 + 1)).loss / 2).backward()
        gradient = model.get_parameter(name).grad
        assert float(driven.method.norms[probe]) == pytest.approx(float(gradient.double().norm()), rel=1e-5)
    assert list(probed.values()) == [2]


def test_the_codes_first_set_is_random_and_counts_tensors() -> None:
    """_choose_top_k_params_by_mag: the sort by magnitude is a shuffle; int((1 - s) * tensors) of them."""
    model = llama()
    sets = [Hand(BlockLLM, CODE, seed=seed, model=model).method.pending for seed in range(300)]
    assert {len(chosen) for chosen in sets} == {18}
    counts = Counter(i for chosen in sets for i in chosen)
    expected = 300 * 18 / 37
    # inclusions of one draw exclude each other, which narrows their spread
    chi2 = sum((counts[i] - expected) ** 2 for i in range(37)) / (expected * (1 - 18 / 37)) * 36 / 37
    assert chi2 < 80  # 36 degrees of freedom, 1 in 30,000


def test_what_is_chosen_takes_plain_adamw_steps() -> None:
    """Paper, algorithm 1, within one choice: Adam on the set, everything else stands still."""
    driven = hand({**CODE, "update_freq": 100}, weight_decay=0.1)
    weights = {name: w.double() for name, w in driven.start.items()}
    states: dict[str, dict[str, Any]] = {}
    for number in range(6):
        seen = driven.step(number, factor=1 - number / 10)
        assert set(seen.gradients) == set(seen.trace.tensors or ())
        for name, gradient in seen.gradients.items():
            lr = driven.lr * (1 - number / 10)
            weights[name] = adam64(weights[name], gradient, states.setdefault(name, {}), lr=lr, decay=0.1)
    assert max(float((seen.weights[n].double() - weights[n]).abs().max()) for n in weights) < 1e-5


def test_the_paper_ranks_sleeping_tensors_by_size_until_visits_hold_them_back() -> None:
    """Score = ||g / (|g| + eps)|| / frequency: sqrt(entries) where every entry has a gradient (our reading)."""
    method = hand({"variant": "paper", "sparsity": 0.7, "patience": 2}).method
    for i, tensor in enumerate(method.tensors):
        assert method.scores[i] == pytest.approx(math.sqrt(tensor.numel()), rel=5e-3)
    assert method.keep == int(0.3 * 9360)
    assert {method.tensors[i].numel() for i in method.pending} == {512}
    first = set(method.pending)
    method.begin_step(0)
    method.optimizer.state.clear()
    method.active = ()
    method._choose_by_direction(method.model(**batch(n)).loss for n in range(1))
    # visited once in one choice: frequency 1; never visited: a half, so twice the score
    assert first.isdisjoint(method.pending)


def test_the_paper_measures_with_one_gradient_alive_and_leaves_weights_alone() -> None:
    driven = hand({"variant": "paper", "sparsity": 0.7, "patience": 1})
    driven.step(0)
    method, before = driven.method, driven.weights()
    alive: list[int] = []
    for tensor in method.tensors:
        # a hook is for what has gradients; whether it has them now is put back
        trains, _ = tensor.requires_grad, tensor.requires_grad_(True)
        tensor.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in method.tensors))
        )
        tensor.requires_grad_(trains)
    method._directions(method.model(**batch(n)).loss for n in (5,))
    assert max(alive) <= 1
    assert len(alive) == len(method.tensors) - len(method.active)
    assert all(torch.equal(w, before[name]) for name, w in driven.weights().items())
    assert [i for i, p in enumerate(method.tensors) if p.requires_grad] == list(method.active)


@pytest.mark.parametrize(("loss", "again"), [(2.1, True), (1.9, False)])
def test_the_paper_chooses_again_when_the_loss_exceeds_its_recent_mean(loss: float, again: bool) -> None:
    """Paper: a loss above the mean of the m before it, at any step; the new set trains from the next step on."""
    driven = hand({"variant": "paper", "sparsity": 0.7, "patience": 2})
    driven.step(0)
    method, before = driven.method, driven.method.active
    method.history = [99.0, 2.5, 1.5]
    method.begin_step(1)
    method.backward(driven.model(**batch(1)).loss, last=True)
    method.loss.fill_(loss)
    method.end_step(lambda: (driven.model(**batch(n)).loss for n in (1,)))
    assert method.active == before
    assert (method.pending is not None) is again
    method.begin_step(2)
    assert (method.active != before) is again


def test_a_share_that_the_largest_tensor_fills_is_refused() -> None:
    def reason(sparsity: float) -> str | None:
        options = BlockLLMOptions(sparsity=sparsity)
        return BlockLLM(options, recipe=recipe_of(), lr=1e-3, seed=0).skip(facts_of_llama(llama()))

    said = reason(0.95)
    assert said is not None
    assert "lower sparsity" in said
    assert reason(0.9) is None
