"""Data parallelism: what real processes see that train together over gloo (`grass_ranks` is what each of them runs)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grass_rank_collectives import SIZES, mixed_gradients
from grass_rank_runs import CASES, COMMON, RESUMED, STEPS, WHOLE, exact_probe, forked, half, run_case
from grass_tiny import llama, same, weights
from rank_scripts import run_script
from torch import Tensor, nn

import grass
from grass import distributed

DEADLINE_S = 120

Seen = Callable[[str], list[Any]]
"""Name of a scenario -> what its ranks saw, in the order of ranks."""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    folder = tmp_path_factory.mktemp("ranks")
    python_path = str(Path(grass.__file__).parents[1])
    run_script("grass_ranks.py", folder, python_path=python_path, deadline_s=DEADLINE_S)

    @functools.cache
    def load(scenario: str) -> list[Any]:
        return [torch.load(path, weights_only=True) for path in sorted(folder.glob(f"{scenario}-[0-9].pt"))]

    return load


@functools.cache
def one_process(name: str, parts: tuple[Any, ...]) -> dict[str, Any]:
    """The same training in this process, probed with the batches of both ranks."""
    return run_case(name, list(parts), [0, 1])


def equal(one: Any, other: Any) -> bool:
    """To the last bit, however nested."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def is_mean(found: Tensor, parts: list[Tensor]) -> bool:
    """Of three parts, but for three roundings, and as much again for the mean that it is compared with."""
    together = torch.stack(parts).double()
    roundings = torch.finfo(found.dtype).eps * together.abs().sum(0)
    return bool(((found - together.mean(0)).abs() <= roundings).all())


def column(run: dict[str, Any], field: str) -> list[Any]:
    return [record[field] for record in run["records"]]


def deviation(one: dict[str, Tensor], other: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """Distance of the ends of two trainings, in lengths of the way from `start` to the second."""

    def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return float(torch.stack([(a[name].double() - b[name].double()).norm() for name in a]).norm())

    return distance(one, other) / distance(other, start)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("name", CASES)
def test_ranks_agree_to_the_last_bit_on_weights_records_and_state(seen: Seen, name: str) -> None:
    first, second = seen(name)
    assert equal(first, second)
    # and it was worth asking: layers changed, clipping bit at every step
    assert len(set(column(first, "active")) - {()}) > 1
    assert min(first["norms"]) > {**COMMON, **CASES[name]}["max_grad_norm"]


@pytest.mark.parametrize("name", [name for name in CASES if name != "accumulated"])
def test_two_ranks_do_what_one_process_does_that_accumulates_both_halves_to_the_last_bit(seen: Seen, name: str) -> None:
    """The sum of two gradients has one order, and halves and doubles are exact in binary."""
    run, one = seen(name)[0], one_process(name, (0, 1))
    assert same(run["weights"], one["weights"])
    assert equal(column(run, "active"), column(one, "active"))
    assert run["norms"] == one["norms"]
    # m: a mean of means in float64; squared norms of both halves are summed in fp32 where probed in step
    within = 1e-6 if name == "probed in step" else 1e-14
    for mine, theirs in zip(run["records"], one["records"], strict=True):
        assert mine["importance"] == (theirs["importance"] and pytest.approx(theirs["importance"], rel=within, abs=0))
        expected = theirs["norm"] if theirs["active"] else pytest.approx(theirs["norm"], rel=within, abs=0)
        assert mine["norm"] == expected


@pytest.mark.parametrize("name", [name for name in CASES if name != "probed in step"])
def test_two_ranks_do_what_one_process_does_with_the_whole_batch_but_for_rounding(seen: Seen, name: str) -> None:
    """The gradient of a whole batch is one sum over its tokens, and no sum of two halves: it is rounded otherwise.

    Fp32 rounds by 6e-8 of a term, and AdamW makes updates of gradients that keep their relative deviation, but for
    entries that cancel nearly to zero. Seen after 11 steps: up to 7e-6 of the way that the weights went. Bf16 rounds by
    4e-3, activations and weights too: up to 0.08. (In-step probing measures halves by their own squares, so that the
    whole batch shows it something else.)
    """
    run, one = seen(name)[0], one_process(name, (WHOLE,))
    dtype = CASES[name].get("dtype", torch.float32)
    assert equal(column(run, "active"), column(one, "active"))
    limit = 0.2 if dtype == torch.bfloat16 else 1e-4
    assert deviation(run["weights"], one["weights"], weights(llama(dtype=dtype))) < limit


def test_gradients_are_averaged_once_a_step_under_accumulation(seen: Seen) -> None:
    """Four gradients have more than one order of summing: fp32 rounding. Seen: 1.3e-6 of the way."""
    run, one = seen("accumulated")[0], one_process("accumulated", (0, 1))
    assert equal(column(run, "active"), column(one, "active"))
    assert deviation(run["weights"], one["weights"], weights(llama())) < 1e-4
    traffic = seen("traffic")[0]
    assert traffic["3 backward passes"]["calls"] == traffic["1 backward passes"]["calls"]


def test_a_step_reduces_the_gradients_that_train_and_a_byte_for_each_of_them(seen: Seen) -> None:
    for found in seen("traffic"):
        step = found["1 backward passes"]
        assert step["awake"] < step["model"]
        assert step["calls"] == [(torch.uint8, step["tensors"]), (torch.float32, step["awake"])]


def test_the_first_importance_is_the_mean_over_the_probing_steps_of_all_ranks(seen: Seen) -> None:
    expected = [0.0] * 4
    for rank in (0, 1):
        opt = grass.Grass(llama(), **COMMON)
        opt.probe([half(seed, rank) for seed in (-1, -2)])
        assert opt.importance is not None
        expected = [e + m / 2 for e, m in zip(expected, opt.importance.values, strict=True)]
    assert column(seen("importance")[0], "importance")[0] == pytest.approx(expected, rel=1e-14, abs=0)


def test_the_exact_probe_measures_the_gradient_averaged_over_ranks(seen: Seen) -> None:
    """Two micro-batches on two ranks are the four of one process; summed in fp32, in another order."""
    first, second = seen("probed exactly")
    four = [half(seed, part) for step in ((0, 1), (2, 3)) for part in (0, 1) for seed in step]
    assert first == second
    assert first == pytest.approx(exact_probe(four, 4), rel=1e-6)


@pytest.mark.parametrize(("name", "stop"), RESUMED)
def test_ranks_that_resume_from_the_state_of_one_end_as_if_nothing_had_happened(
    seen: Seen, name: str, stop: int
) -> None:
    straight = seen(name)[0]
    for found in seen("resumed"):
        after = found[f"{name}, {stop}"]
        assert equal(after["weights"], straight["weights"])
        assert equal(after["state"], straight["state"])
        assert after["records"] == straight["records"][stop:]
        assert len(after["records"]) == STEPS - stop


def test_a_gradient_of_one_rank_counts_as_zero_on_the_other_and_one_of_none_is_left_out(seen: Seen) -> None:
    first, second = seen("forked")
    one = forked([0, 1])
    assert equal(first, second)
    assert equal(first, one)
    for name, start in first["start"].items():
        # `never` does not even decay
        assert torch.equal(first["weights"][name], start) is ("never" in name)


# ---------------------------------------------------------------- refusals


MEND = "give Grass the same model, weights, options, seed and state dict on every rank"


@pytest.mark.parametrize(
    ("what", "here", "there"),
    [
        ("seed", "seed (here 0), layers (here [0, 3])", "seed (here 1), layers (here [1, 2])"),
        ("temperature", "temperature (here 0.2)", "temperature (here 1.2)"),
        ("target", "target (here 0.6)", "target (here 0.85)"),
        (
            "active_layers",
            "active_layers (here 2), layers (here [0, 3])",
            "active_layers (here 3), layers (here [0, 1, 3])",
        ),
        ("sampler", "sampler (here importance)", "sampler (here uniform)"),
        ("reprobe", "reprobe (here False)", "reprobe (here True)"),
        ("trained groups", "train_head (here True)", "train_head (here False)"),
        ("frozen", "frozen entries (here 0)", "frozen entries (here 16)"),
        ("model", "parameters (here 39 with 10,384 entries)", "parameters (here 48 with 12,720 entries)"),
        ("weights", "weights (here checksum ", "weights (here checksum "),
        ("learning rate", "learning rates (here [0.01])", "learning rates (here [0.003, 0.01])"),
        ("state", "steps (here 1)", "steps (here 3)"),
    ],
)
def test_ranks_that_would_train_apart_are_all_told_in_what_they_differ(
    seen: Seen, what: str, here: str, there: str
) -> None:
    for found, differs in zip(seen("disagreements"), (here, there), strict=True):
        assert found[what].startswith(f"ranks differ in {differs}"), found[what]
        assert found[what].endswith(f"): {MEND}")


@pytest.mark.parametrize(
    ("what", "differs"),
    [
        ("batches", "batches of the probe (here {})"),
        ("no batch", "batches of the probe (here {})"),
        ("exact batches", "micro-batches of an exact probing step (here {})"),
        ("exact steps", "micro-batches of an exact probing step (here {})"),
    ],
)
def test_a_probe_with_more_batches_on_one_rank_is_refused_on_all(seen: Seen, what: str, differs: str) -> None:
    counts = {"batches": (2, 3), "no batch": (0, 1), "exact batches": (2, 1), "exact steps": (2, 0)}[what]
    said = [f"ranks differ in {differs.format(count)}: give every rank as many" for count in counts]
    assert [found[what] for found in seen("disagreements")] == said


def test_ranks_that_do_not_even_compare_the_same_are_refused_and_do_not_wait_for_each_other(seen: Seen) -> None:
    assert [found["what is compared"] for found in seen("disagreements")] == [
        "ranks differ in steps (here 0): ask alike",
        "ranks differ in batches (here 2), micro-batches (here 1): ask alike",
    ]


def test_ranks_may_keep_their_states_in_different_places(seen: Seen) -> None:
    assert [found["nothing"] for found in seen("disagreements")] == [None, None]


def test_wrapped_models_are_refused_where_a_process_group_is_at_work(seen: Seen) -> None:
    for found in seen("wrapped"):
        assert (
            "pass the plain module (model.module), Grass.step() averages the gradients"
            in (found["DistributedDataParallel"])
        )
        assert "is sharded by FSDP" in found["fully_shard"]


@pytest.mark.parametrize(("beside", "find_unused"), [(False, False), (False, True), (True, True)])
def test_ranks_under_distributed_data_parallel_diverge_in_silence_once_another_layer_trains(
    seen: Seen, beside: bool, find_unused: bool
) -> None:
    """Why it is refused."""
    for toggle in (False, True):
        first, second = (found[f"{toggle=}, {beside=}, {find_unused=}"] for found in seen("toggled under ddp"))
        assert first["error"] is second["error"] is None
        assert equal(first["weights"], second["weights"]) is not toggle


def test_distributed_data_parallel_notices_only_where_something_else_trains_all_the_time(seen: Seen) -> None:
    for found in seen("toggled under ddp"):
        error = found["toggle=True, beside=True, find_unused=False"]["error"]
        assert "Expected to have finished reduction" in error


# ---------------------------------------------------------------- collectives


def test_an_average_is_the_same_on_every_rank_to_the_last_bit(seen: Seen) -> None:
    ranks = seen("averages")
    assert len(ranks) == 3
    assert equal(ranks[0], ranks[1])
    assert equal(ranks[0], ranks[2])
    generators = [torch.Generator().manual_seed(rank) for rank in range(3)]
    for found in ranks[0]:
        parts = [
            torch.randn(found.shape, generator=g).to(found.dtype) * 10 ** (3 * rank)
            for rank, g in enumerate(generators)
        ]
        assert is_mean(found, parts)


def test_gradients_of_any_dtype_size_and_layout_are_averaged_in_place(seen: Seen) -> None:
    ranks = [found["gradients"] for found in seen("averaged gradients")]
    assert equal(ranks[0], ranks[1])
    assert equal(ranks[0], ranks[2])
    for found, *parts in zip(ranks[0], *(mixed_gradients(rank) for rank in range(3)), strict=True):
        assert found.dtype == parts[0].dtype
        assert is_mean(found, parts)


def test_small_gradients_are_reduced_together_those_of_one_dtype_up_to_a_bucket(seen: Seen) -> None:
    """Buckets of 256 bytes: [1, 60], [65], [130], [64], [48], [1600], [18] entries of fp32, all of bf16 in one."""
    fp32 = [4 * entries for entries in (1 + 60, 65, 130, 64, 48, 1600, 18)]
    bf16 = [2 * sum(SIZES[1::2])]
    expected = [(torch.uint8, len(SIZES) + 3)]
    expected += [(torch.float32, size) for size in fp32] + [(torch.bfloat16, size) for size in bf16]
    for found in seen("averaged gradients"):
        assert found["calls"] == expected


def test_the_host_waits_for_nothing_where_no_gradient_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    # a meta tensor cannot be read
    parameters = [nn.Parameter(torch.empty(size, device="meta")) for size in (3, 4)]
    reduced: list[int] = []
    monkeypatch.setattr(distributed, "ranks", lambda: 2)
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda tensor, **options: reduced.append(tensor.numel()))
    for p in parameters:
        p.grad = torch.empty_like(p)
    distributed.average_gradients(parameters)
    assert reduced == [2, 7]
    parameters[0].grad = None
    with pytest.raises(NotImplementedError, match="meta"):
        distributed.average_gradients(parameters)


def test_without_a_process_group_nothing_is_touched() -> None:
    assert distributed.ranks() == 1
    parameter = nn.Parameter(torch.ones(2))
    distributed.average_gradients([parameter])
    assert parameter.grad is None
    values = torch.ones(2)
    assert distributed.average(values) is values
    distributed.check_agreement({"seed": 0}, torch.device("cpu"), mend="none")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_checksum_sees_every_entry_and_every_parameter(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "CHECKSUM_ENTRIES", 4)
    torch.manual_seed(0)
    plain = [torch.randn(3, 3).to(dtype), torch.randn(2).to(dtype)]
    sign, last_bit = ([t.clone() for t in plain] for _ in range(2))
    sign[0][2, 2].neg_()
    last_bit[1][0] = torch.nextafter(plain[1][0], torch.ones((), dtype=dtype))
    found = [distributed.checksum(tensors) for tensors in (plain, sign, last_bit, plain[::-1])]
    assert len(set(found)) == 4
    assert distributed.checksum([t.clone() for t in plain]) == found[0]
    # the order in memory is no part of it
    assert distributed.checksum([plain[0].t().contiguous().t(), plain[1]]) == found[0]
