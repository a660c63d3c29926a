"""MISA (arXiv 2511.00056; repository pkumelon/MISA) against its definition, by other arithmetic than its own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from grass_tiny import llama
from rival_steps import Hand, adam64, facts_of_llama, recipe_of

from baselines.misa import Misa, MisaOptions

PARAMETERS = 10_384
"""Of the tiny Llama; its layers have matrices of 128 (k, v), 256 (q, o) and 512 entries (gate, up, down)."""


def idle(method_class: type[Misa] = Misa, **options: Any) -> Any:
    """A method attached to the tiny Llama whose steps the test calls itself."""
    return Hand(method_class, options, seed=3).method


def give_norm(method: Any, module: int, norm: float) -> None:
    """As if `module` alone had trained for one period with this norm (code) or scaled squared norm (paper)."""
    method.active = (module,)
    method.sums[module] = norm * method.options.period
    method._score()


def test_paper_draws_by_the_softmax_of_the_scores() -> None:
    """Paper, sampling: p_b = exp(eta G_b) / sum; eta 2, G = (0, 0.5, 1, ...) give odds 1 : e : e^2."""
    method = idle(variant="paper", share=0.1, eta=2.0)
    method.scores[:3] = [0.0, 0.5, 1.0]
    p = method.probabilities()
    total = (len(p) - 2) + math.e + math.e**2
    assert p[:4] == pytest.approx([1 / total, math.e / total, math.e**2 / total, 1 / total])
    assert math.fsum(p) == pytest.approx(1)


def test_code_squares_inside_the_exponent_and_caps_it() -> None:
    """Repository, optimizer.py: exp(min(5, eta G^2)); G = (0, 1, 2, 3, 30) give exponents 0, 1, 4, 5, 5."""
    method = idle(variant="code", share=0.1)
    method.scores[:5] = [0.0, 1.0, 2.0, 3.0, 30.0]
    p = method.probabilities()
    assert [math.log(p[i] / p[0]) for i in range(5)] == pytest.approx([0, 1, 4, 5, 5])


def test_a_layers_belief_is_the_mean_score_and_the_summed_probability_of_its_modules() -> None:
    method = idle(variant="paper", share=0.1)
    method.scores[:7] = [7.0, 0, 0, 0, 0, 0, 0]
    trace = method.trace()
    assert trace.importance == pytest.approx((1, 0, 0, 0))
    assert math.fsum(trace.probability) == pytest.approx(1)
    assert trace.probability[0] == pytest.approx((math.e**7 + 6) / (math.e**7 + 27))


def compounding_differs(method_class: type[Misa]) -> str | None:
    """Repository, optimizer.py: at norm 1 the average reads 2.8 at visit 2, 10 at visit 7 and 1 again near visit 35."""
    method = idle(method_class, variant="code", share=0.1)
    read = []
    for _ in range(60):
        give_norm(method, 0, 1.0)
        read.append(method.scores[0])
    wanted = {1: 1.0, 2: 1 / 0.36, 3: (0.8 / 0.36 + 0.2) / (1 - 0.8**3), 7: 10.08}
    for visit, score in wanted.items():
        if not math.isclose(read[visit - 1], score, rel_tol=1e-3):
            return f"visit {visit}: {read[visit - 1]:.3f}, by hand {score:.3f}"
    if not (1.1 > read[34] > 1.0 and max(read) == read[6]):
        return f"visit 35: {read[34]:.3f}, largest {max(read):.3f}"
    return None


def test_the_codes_bias_correction_compounds() -> None:
    assert compounding_differs(Misa) is None


class CorrectsOnlyWhatIsRead(Misa):
    """The bias correction as Adam has it: the average itself stays uncorrected."""

    def _score(self) -> None:
        before, self.scores = self.scores, list(getattr(self, "raw", self.scores))
        for i in self.active:
            self.visits[i] += 1
            self.scores[i] = 0.8 * self.scores[i] + 0.2 * float(self.sums[i]) / self.options.period
        self.raw = list(self.scores)
        for i in self.active:
            before[i] = self.scores[i] / (1 - 0.8 ** self.visits[i])
        self.scores = before


def test_a_correction_that_does_not_compound_is_caught() -> None:
    assert compounding_differs(CorrectsOnlyWhatIsRead) == "visit 2: 1.000, by hand 2.778"


def test_the_papers_average_has_no_bias_correction() -> None:
    """Paper, algorithm 1: G <- beta G + (1 - beta) x from G = 0, so 1 - 0.8^n at x = 1."""
    method = idle(variant="paper", share=0.1)
    for visit in range(1, 36):
        give_norm(method, 0, 1.0)
        assert method.scores[0] == pytest.approx(1 - 0.8**visit)


def test_paper_scores_are_mean_squares_before_clipping() -> None:
    """Paper, algorithm 1: mean over the T inner steps of ||g_b||^2, scaled by count (our reading: divided)."""
    hand = Hand(Misa, {"variant": "paper", "share": 0.1, "period": 3}, max_grad_norm=0.01)
    seen = list(hand.steps(3))
    hand.method.begin_step(3)
    names = seen[0].trace.tensors
    assert names
    for name in names:
        squares = [float(s.gradients[name].double().square().mean()) for s in seen]
        score = hand.method.scores[hand.method.names.index(name)]
        assert score == pytest.approx(0.2 * sum(squares) / 3, rel=1e-5)


def test_code_scores_are_norms_after_clipping_and_a_fiftieth_in_the_first_cycle() -> None:
    """Repository: norms are read after the Trainer's clipping; in the first cycle one step's norm is divided by T."""
    hand = Hand(Misa, {"variant": "code", "share": 0.1, "period": 50}, max_grad_norm=0.01)
    seen = hand.step(0)
    hand.method.begin_step(1)
    norms = {name: float(seen.gradients[name].double().norm()) for name in seen.trace.tensors or ()}
    total = math.sqrt(sum(norm**2 for norm in norms.values()))
    assert total > 0.1, "clipping must bite, or this says nothing"
    for name, norm in norms.items():
        score = hand.method.scores[hand.method.names.index(name)]
        assert score == pytest.approx(norm * 0.01 / total / 50, rel=1e-4)


def test_the_codes_first_cycle_goes_bottom_up_through_every_module_one_step_each() -> None:
    """Repository: until each was drawn once the set changes at every step, from the bottom; then every T steps."""
    method = idle(variant="code", share=0.1, period=4)
    cycle, step = [], 0
    while not all(method.visits):
        method.begin_step(step)
        cycle.append(method.active)
        step += 1
    cycle.pop()  # the draw that found every module visited
    assert sorted(i for chosen in cycle for i in chosen) == list(range(28))
    # 1,038 entries fit: q, k, v, o of layer 0 (768), where only the next layer's q (256) finds room; then gate and up
    assert cycle[:2] == [(0, 1, 2, 3, 7), (4, 5)]
    ends = step - 1
    sets = []
    for later in range(ends, ends + 12):
        method.begin_step(later)
        sets.append(method.active)
    assert sets[0:4] == [sets[0]] * 4
    assert sets[4:8] == [sets[4]] * 4


def test_the_longest_unused_modules_always_enter() -> None:
    """Repository, sample_last = 2: whatever the odds, the two modules of the earliest draw train next."""
    method = idle(variant="code", share=0.2, period=1)
    step = 0
    while not method.candidates or not all(method.visits):
        method.begin_step(step)
        step += 1
    for later in range(step, step + 40):
        method.scores[0] = 100.0
        before = sorted(method.candidates, key=lambda i: (method.last_draw[i] if i not in method.active else 10**9, i))
        method.begin_step(later)
        assert set(before[:2]) <= set(method.active)


@pytest.mark.parametrize("variant", ["paper", "code"])
@pytest.mark.parametrize("share", [0.03, 0.06, 0.13])
def test_the_share_is_never_exceeded(variant: str, share: float) -> None:
    """Paper, algorithm 1: the ratio of trainable parameters stays below delta."""
    method = idle(variant=variant, share=share, period=1)
    for step in range(200):
        method.begin_step(step)
        trained = sum(p.numel() for p in method.model.parameters() if p.requires_grad)
        assert 0 < trained <= share * PARAMETERS


def test_the_code_fills_until_none_fits_and_the_paper_stops_at_the_first_that_does_not() -> None:
    """With 600 entries: the code never leaves room for a module of 128; the paper's draws sometimes do."""
    share, smallest, left = 600 / PARAMETERS, 128, {}
    for variant in ("paper", "code"):
        method = idle(variant=variant, share=share, period=1)
        rooms = []
        for step in range(120):
            method.begin_step(step)
            unused = [i for i in range(28) if i not in method.active and method.weights[i].numel() == smallest]
            rooms.append(method.budget - sum(method.weights[i].numel() for i in method.active) if unused else 0)
        left[variant] = max(rooms[60:])
    assert left["code"] < smallest <= left["paper"]


def test_modules_are_drawn_as_often_as_the_probabilities_say() -> None:
    """One module a draw: three modules with odds 8 : 4 : 1 of all others, 4,000 draws (chi-square, 1 in 10,000)."""
    method = idle(variant="paper", share=200 / PARAMETERS)  # only the eight k and v matrices fit
    for place, odds in zip(method.candidates, (8.0, 4.0, 1, 1, 1, 1, 1, 1), strict=True):
        method.scores[place] = math.log(odds)
    p = method.probabilities()
    counts = dict.fromkeys(method.candidates, 0)
    for _ in range(4000):
        (drawn,) = method._draw()
        counts[drawn] += 1
    chi2 = sum((counts[i] - 4000 * p[i]) ** 2 / (4000 * p[i]) for i in method.candidates)
    assert chi2 < 29.9


def weights_differ(method_class: type[Misa]) -> str | None:
    """Paper, algorithm 1: T Adam steps with a max-type moment, one step of beta1 / (1 - beta1), states cleared."""
    period = 3
    options = {"variant": "paper", "share": 0.15, "period": period}
    hand = Hand(method_class, options, weight_decay=0.1, steps=8)
    weights = {name: w.double() for name, w in hand.start.items()}
    states: dict[str, dict[str, Any]] = {}
    for number in range(8):
        factor = 1 - number / 10
        seen = hand.step(number, factor=factor)
        if number % period == 0:
            states = {}
        for name in seen.trace.tensors or ():
            state = states.setdefault(name, {})
            lr = hand.lr * factor
            weights[name] = adam64(weights[name], seen.gradients[name], state, lr=lr, decay=0.1, largest=True)
            if number % period == period - 1:
                weights[name] = weights[name] - lr * 0.9 / (1 - 0.9) * state["direction"]
        gap = max(float((seen.weights[name].double() - weights[name]).abs().max()) for name in weights)
        if gap > 2e-5:
            return f"after step {number} weights are {gap:.1e} away from the definition"
    return None


def test_the_papers_steps_by_hand_with_the_extra_momentum_step() -> None:
    assert weights_differ(Misa) is None


class SkipsTheExtraStep(Misa):
    def _momentum_step(self) -> None:
        pass


class KeepsStateAcrossDraws(Misa):
    def _activate(self, chosen: tuple[int, ...]) -> None:
        assert self.optimizer is not None
        kept = {i: self.optimizer.state.get(self.held[i]) for i in self.active}
        super()._activate(chosen)
        self.optimizer.state.update({self.weights[i]: state for i, state in kept.items() if i in chosen and state})


@pytest.mark.parametrize("broken", [SkipsTheExtraStep, KeepsStateAcrossDraws])
def test_a_broken_inner_loop_is_caught(broken: type[Misa]) -> None:
    assert weights_differ(broken) is not None


def test_the_code_keeps_state_only_of_what_is_drawn_again_at_once() -> None:
    """Repository: moments are deleted unless the module is re-drawn at once; then its step count goes on."""
    hand = Hand(Misa, {"variant": "code", "share": 0.5, "period": 2}, steps=14)
    counts: dict[int, int] = {}
    kept = 0
    for number in range(14):
        before = set(hand.method.active)
        hand.step(number)
        active = hand.method.active
        counts = {i: counts.get(i, 0) + 1 if i in before else 1 for i in active}
        state = hand.method.optimizer.state
        assert {id(p) for p in state} == {id(hand.method.weights[i]) for i in active}
        assert {i: state[hand.method.weights[i]]["step"] for i in active} == counts
        kept += number % 2 == 0 and any(n > 2 for n in counts.values())
    assert kept, "no module was drawn twice running: this says nothing"


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_steps_too_small_for_bf16_add_up_in_the_fp32_copy(variant: str) -> None:
    """BAdam's copy, on which the repository builds: weights of 0.02 move in bf16 by steps of 1e-4 or not at all."""
    options = {"variant": variant, "share": 1.0, "period": 40}
    hand = Hand(Misa, options, lr=3e-6, weight_dtype="bf16", steps=40)
    last = list(hand.steps(20))[-1]
    moved = torch.cat([(last.weights[n] != hand.start[n]).flatten() for n in last.trace.tensors or ()])
    # rounded at every step, next to none would move
    assert float(moved.float().mean()) > 0.1


def test_a_share_below_the_smallest_matrix_is_refused_with_the_share_to_set() -> None:
    facts = facts_of_llama(llama())

    def reason(share: float) -> str | None:
        return Misa(MisaOptions(share=share), recipe=recipe_of(), lr=1e-3, seed=0).skip(facts)

    assert facts.total_parameters == PARAMETERS
    said = reason(0.01)
    assert said is not None
    assert "set share to 0.0124" in said
    assert reason(0.0124) is None
