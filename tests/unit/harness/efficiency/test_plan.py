"""Which cells come first, how repeats are interleaved, what a time budget lets through, and uniform draws."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from statistics import fmean

import efficiency_data as data
import pytest
from harness.efficiency.arithmetic import PERIOD, mean_step_s, percentile
from harness.efficiency.budget import FIRST_S, MARGIN, REPORT_S, Budget, Estimates
from harness.efficiency.plan import Unit, plan, units
from harness.efficiency.uniform_draws import expected_reach, nth_set, stratified_sets, uniform_policy
from harness.errors import UserError

STUDY = data.study()
MAIN = "llama-2-7b"


# ---------------------------------------------------------------- order


def test_what_the_targets_need_comes_first() -> None:
    groups = plan(STUDY, "cuda")
    corners = [(g.entries[0].named.model, g.entries[0].named.settings, g.entries[0].named.shape) for g in groups]
    assert corners[:3] == [(MAIN, "plain", "1x1024"), (MAIN, "lean", "1x1024"), (MAIN, "lean", "4x1024")]
    assert [e.named.label for e in groups[0].entries] == list(STUDY.compared)
    assert [e.named.label for e in groups[2].entries] == [*STUDY.compared, "grass-decoder+offload=resident"]
    assert {e.named.variant for group in groups[3:6] for e in group.entries} == {"active_layers=4"}
    models = list(dict.fromkeys(model for model, _, _ in corners))
    assert models == [MAIN, "gemma-2b", "tinyllama-1.1b", "llama-3.1-8b", "qwen3-8b", "tiny"]
    lengths = [shape for model, _, shape in corners if model == MAIN and "1024" not in shape]
    assert lengths == [f"1x{n}" for n in (1792, 256, 4096, 512, 2048) * 2]
    first_late, last_length = (
        corners.index(("llama-3.1-8b", "plain", "1x1024")),
        corners.index((MAIN, "lean", "1x2048")),
    )
    assert last_length < first_late


def test_every_cell_of_the_study_is_planned_once() -> None:
    counted = Counter(data.words(plan(STUDY, "cuda")))
    every = {
        f"{model}/{method}/{settings}/{shape}"
        for model in STUDY.models
        for method in STUDY.methods
        for settings in STUDY.settings
        for shape in STUDY.shapes
    }
    assert every <= counted.keys()
    assert set(counted.values()) == {1}


def test_a_cpu_rehearses_on_the_tiny_model_alone() -> None:
    named = [e.named for group in plan(STUDY, "cpu") for e in group.entries]
    assert {n.model for n in named} == {"tiny"}
    assert {n.variant for n in named} == {"", "offload=resident", "active_layers=4"}


def test_variants_change_the_options_that_they_name() -> None:
    assert data.entry(MAIN, "grass-decoder", "lean", "4x1024", "offload=resident").cell.options["offload"] == "resident"
    assert data.entry(MAIN, "grass", "plain", "1x1024", "active_layers=4").cell.options["active_layers"] == 4


def test_repeats_are_interleaved_over_the_methods_of_a_group() -> None:
    (group,) = plan(STUDY, "cuda", [f"{MAIN}/lora/plain/1x1024", f"{MAIN}/grass/plain/1x1024"])
    assert [data.said(unit) for unit in units([group], 3)] == [
        "lora memory", "lora timing0", "grass memory", "grass timing0",
        "lora timing1", "grass timing1",
        "lora timing2", "grass timing2",
    ]  # fmt: skip


def test_long_rows_are_measured_for_their_memory_alone() -> None:
    groups = plan(STUDY, "cuda", [f"{MAIN}/lora/plain/1x4096"])
    assert [data.said(unit) for unit in units(groups, 3)] == ["lora memory"]


def test_only_takes_globs_and_refuses_one_that_matches_nothing() -> None:
    assert set(data.words(plan(STUDY, "cuda", ["gemma-2b/grass*/lean/1x1024"]))) == {
        "gemma-2b/grass/lean/1x1024",
        "gemma-2b/grass-decoder/lean/1x1024",
    }
    with pytest.raises(UserError, match="--only gemma/lora: no cell is called so"):
        plan(STUDY, "cuda", ["gemma/lora"])


# ---------------------------------------------------------------- budget


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def unit(method: str = "lora", settings: str = "plain", shape: str = "1x1024", repeat: int = 0) -> Unit:
    return Unit(data.entry(MAIN, method, settings, shape), "timing", repeat)


def test_a_budget_keeps_time_back_for_the_report() -> None:
    clock = Clock()
    budget = Budget(60.0, clock)
    assert budget.left() == 60 - REPORT_S
    clock.seconds += 20
    assert budget.spent() == 20
    assert budget.allows((60 - REPORT_S - 20) / MARGIN)
    assert not budget.allows((60 - REPORT_S - 20) / MARGIN + 0.1)
    assert Budget(None, clock).allows(1e9)


def test_an_estimate_is_that_of_the_nearest_block_measured() -> None:
    estimates = Estimates()
    assert estimates.of(unit()) == FIRST_S
    estimates.add(unit(shape="4x1024", settings="lean"), 40.0)
    assert estimates.of(unit()) == 40.0
    estimates.add(unit("grass"), 8.0)
    estimates.add(unit("full"), 11.0)
    assert estimates.of(unit()) == 11.0
    estimates.add(unit(), 9.0)
    assert estimates.of(unit(repeat=1)) == 9.0


def test_more_tokens_are_estimated_to_take_longer() -> None:
    estimates = Estimates()
    estimates.add(unit(), 5.0)
    assert estimates.of(unit(shape="4x1024", settings="lean")) == 20.0


# ---------------------------------------------------------------- uniform draws


def test_sets_are_numbered_in_lexicographic_order() -> None:
    assert [nth_set(6, 3, number) for number in range(20)] == list(combinations(range(6), 3))


def test_draws_of_all_repeats_together_are_spread_over_all_sets() -> None:
    """32 layers, 2 active, 3 repeats of 4: the mean reach of 12 draws is that of uniform draws within 0.02."""
    drawn = [stratified_sets(32, 2, draws=4, repeat=r, repeats=3, seed=0) for r in range(3)]
    reaches = [1 - min(chosen) / 32 for repeat in drawn for chosen in repeat]
    assert len(reaches) == 12
    assert fmean(reaches) == pytest.approx(expected_reach(32, 2), abs=0.02)
    assert expected_reach(32, 2) == pytest.approx(0.6875)


def test_a_further_repeat_has_the_sets_of_an_earlier_one() -> None:
    first, *_, again = (stratified_sets(32, 2, draws=4, repeat=r, repeats=3, seed=0) for r in range(4))
    assert sorted(again) == sorted(first)


def test_each_draw_is_uniform_over_seeds() -> None:
    """Any layer is in a draw with probability 2/5; 2,000 draws put the count within four standard deviations."""
    counted = Counter(
        layer
        for seed in range(1000)
        for chosen in stratified_sets(5, 2, draws=2, repeat=0, repeats=1, seed=seed)
        for layer in chosen
    )
    assert sum(counted.values()) == 4000
    assert all(abs(counted[layer] - 800) < 4 * (2000 * 0.4 * 0.6) ** 0.5 for layer in range(5))


def test_all_methods_meet_the_same_draws_and_repeats_differ() -> None:
    first = [uniform_policy(place, draws=4, repeat=0, repeats=3, seed=0)(32, 2) for place in range(4)]
    assert first == stratified_sets(32, 2, draws=4, repeat=0, repeats=3, seed=0)
    assert first != stratified_sets(32, 2, draws=4, repeat=1, repeats=3, seed=0)


# ---------------------------------------------------------------- arithmetic on steps


def test_a_longer_period_has_one_draw_among_more_steps() -> None:
    """First step of a period 3 s, last 5 s, others 1 s: a period of 50 takes 3 + 5 + 48 s."""
    steps = [3.0, 1.0, 1.0, 1.0, 5.0] * 4
    assert len(steps) % PERIOD == 0
    assert mean_step_s(steps, 50) == pytest.approx(56 / 50)
    assert mean_step_s(steps, PERIOD) == pytest.approx(fmean(steps))
    assert mean_step_s(steps, None) == pytest.approx(fmean(steps))


def test_percentile_is_a_value_that_was_seen() -> None:
    assert percentile(list(range(1, 101)), 0.95) == 95
    assert percentile([3.0, 1.0, 2.0], 0.95) == 3.0
    assert percentile([7.0], 0.95) == 7.0
