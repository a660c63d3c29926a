"""One run under 1, 2 and 4 processes (see `training_ranks`), and what is noticed where they differ."""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.measuring.energy import Joules
from harness.records.reading import read_jsonl
from harness.training import ranks
from harness.training.batches import Batches
from harness.training.launching import launch
from rank_scripts import run_script
from training_ranks import COUNTS, METHODS, RESUMED, STEPS, STOPPED_AFTER

from baselines import find_method, method_names

DEADLINE_S = 400
ROUNDING = 1e-5
"""Largest relative difference of a step's loss: fp32 sums in another order, through six updates."""
AGREED = "all processes hold the same weights"

Found = Callable[[str, int], list[Any]]
"""Scenario and number of processes -> what its ranks found, in the order of ranks."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    python_path = os.pathsep.join(filter(None, sys.path))
    run_script("training_ranks.py", made, python_path=python_path, deadline_s=DEADLINE_S)
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> Found:
    @functools.cache
    def of(scenario: str, count: int) -> list[Any]:
        return [json.loads((folder / f"{scenario}-{count}-{rank}.json").read_text()) for rank in range(count)]

    return of


def losses(folder: Path, count: int, name: str) -> list[float]:
    return [row["loss"] for row in read_jsonl(folder / str(count) / name / "steps.jsonl")]


def counted(folder: Path, count: int, name: str) -> list[int]:
    return [row["tokens"] for row in read_jsonl(folder / str(count) / name / "steps.jsonl")]


# ---------------------------------------------------------------- the same run


@pytest.mark.parametrize("name", METHODS)
def test_1_2_and_4_processes_have_the_same_losses(name: str, folder: Path, found: Found) -> None:
    records = {count: found("straight", count)[0][name] for count in COUNTS}
    table = {count: [*losses(folder, count, name), records[count]["validation_loss"]] for count in COUNTS}
    print(f"\n{name}: processes, loss of steps 1 to {STEPS}, validation loss")
    for count, row in table.items():
        print(count, *(f"{loss:.7f}" for loss in row))
    for count in COUNTS[1:]:
        assert table[count] == pytest.approx(table[1], rel=ROUNDING)
    assert len(set(table[1])) == STEPS + 1, "a run that learns nothing would agree with anything"
    tokens = {
        count: [row["tokens"] for row in read_jsonl(folder / str(count) / name / "steps.jsonl")] for count in COUNTS
    }
    assert tokens[1] == tokens[2] == tokens[4]


def test_the_record_is_that_of_rank_0_and_says_how_many_there_were(found: Found) -> None:
    for count in COUNTS:
        for name in METHODS:
            record = found("straight", count)[0][name]
            assert (record["status"], record["status_why"], record["processes"]) == ("ok", None, count)
            assert all(peak > 0 for peak in record["rank_host_peak_bytes"])
            assert len(record["rank_host_peak_bytes"]) == len(record["rank_device_allocated_peak_bytes"]) == count
            agreed = [check["observed"] for check in record["engagement"] if check["name"] == AGREED]
            assert bool(agreed) == (count > 1)
            assert record["checkpoint"] is not None
    for other in found("straight", 4)[1:]:
        assert other["full"]["checkpoint"] is None, "rank 0 alone exports"


@pytest.mark.parametrize("name", RESUMED)
def test_a_state_of_2_processes_goes_on_under_1_and_4(name: str, folder: Path, found: Found) -> None:
    # the last rank alone was told to end, twice; all ended after the same step
    assert [codes[name] for codes in found("stopped", 2)] == [128 + signal.SIGTERM] * 2
    for count in (1, 4):
        record = found("resumed", count)[0][name]
        assert f"resumed after step {STOPPED_AFTER}" in record["notes"]
        assert "2 processes from step 0 on" in record["notes"]
        assert (f"4 processes from step {STOPPED_AFTER} on" in record["notes"]) == (count == 4)
        assert (record["status"], record["processes"]) == ("ok", count)
        assert losses(folder, count, f"resumed/{name}") == pytest.approx(losses(folder, 1, name), rel=ROUNDING)


# ---------------------------------------------------------------- what is noticed


def test_a_method_that_cannot_is_skipped_with_its_reason(found: Found) -> None:
    for seen in found("planted", 2):
        record = seen["cannot"]
        why = "badam cannot train under 2 processes: give its entry `gpus: 1`"
        assert (record["status"], record["status_why"]) == ("skipped", why)


def test_another_data_order_on_one_rank_is_an_error_on_all(found: Found) -> None:
    for seen in found("planted", 2):
        assert seen["other order"].startswith("at step 0 the processes together took the rows ")


def test_gradients_that_are_not_averaged_are_noticed(found: Found) -> None:
    record = found("planted", 2)[0]["unsynchronised"]
    assert record["status"] == "disengaged"
    assert (
        record["status_why"] == f"{AGREED}: promised at every period's end, bit for bit, saw they differ after step 1"
    )


def test_a_mean_of_the_processes_means_is_another_run(folder: Path) -> None:
    straight, means = losses(folder, 2, "full"), losses(folder, 2, "means")
    assert means[1:] != pytest.approx(straight[1:], rel=10 * ROUNDING)


# ---------------------------------------------------------------- shares


def test_shares_of_a_step_are_its_micro_batches_in_turn() -> None:
    def batches(rank: int, count: int) -> Batches:
        return Batches(
            [], batch_size=8, micro_batch_size=2, seed=0, pad_id=0, device="cpu", share=(rank, count)
        )  # fmt: skip

    with pytest.raises(ValueError, match="3 processes cannot share 4 micro-batches"):
        batches(0, 3)
    assert [list(batches(rank, 2).calibration_numbers(4)) for rank in range(2)] == [[0, 2], [1, 3]]
    assert list(batches(1, 2).calibration_numbers(3)) == [0, 1, 2]


def test_a_step_is_all_shares_by_the_slowest_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = [
        ranks.Share(loss=1.0, grad_norm=2.0, tokens=10, total_tokens=12, seconds=0.5, energy=Joules(3.0), rows=[4, 1]),
        ranks.Share(loss=2.0, grad_norm=2.0, tokens=20, total_tokens=24, seconds=0.7, energy=Joules(4.5), rows=[3, 2]),
    ]
    monkeypatch.setattr(ranks, "gathered", lambda share: shares)
    whole = ranks.total(shares[0], step=0, rows=[1, 2, 3, 4])
    assert (whole.loss, whole.tokens, whole.total_tokens, whole.seconds, whole.finite) == (1.5, 30, 36, 0.7, True)
    assert whole.energy == Joules(7.5), "of all cards"
    shares[1] = replace(shares[1], grad_norm=float("nan"), energy=Joules(None, "its card has no counter"))
    assert ranks.total(shares[0], step=0, rows=[1, 2, 3, 4]).energy == shares[1].energy
    assert not ranks.total(shares[0], step=0, rows=[1, 2, 3, 4]).finite, "all stop if one has no number"


def test_dropout_is_each_processs_own_and_the_same_after_a_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(rank: int, step: int) -> float:
        monkeypatch.setattr(ranks, "rank", lambda: rank)
        ranks.seed_step(0, step)
        return float(torch.rand(()))

    with torch.random.fork_rng():
        monkeypatch.setattr(ranks, "ranks", lambda: 2)
        first = [drawn(rank, step) for rank in range(2) for step in range(3)]
        assert len(set(first)) == 6
        assert first == [drawn(rank, step) for rank in range(2) for step in range(3)]


def test_three_methods_say_that_they_can() -> None:
    assert {name for name in method_names() if find_method(name).RANKS} == {"full", "lora", "grass"}


# ---------------------------------------------------------------- the launcher

FAILS = """
import os, sys, time
if os.environ["RANK"] == "1":
    sys.exit("rank 1 has no more memory")
time.sleep(600)
"""
ENDED = """
import os, pathlib, signal, sys, time
def save(number, frame):
    pathlib.Path(sys.argv[1], os.environ["RANK"]).touch()
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save)
pathlib.Path(sys.argv[1], "ready " + os.environ["RANK"]).touch()
while not all(pathlib.Path(sys.argv[1], f"ready {rank}").exists() for rank in "01"):
    time.sleep(0.01)
if os.environ["RANK"] == "0":
    os.kill(os.getppid(), signal.SIGTERM)
time.sleep(600)
"""


def test_an_error_on_one_rank_ends_all_and_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(["-c", FAILS], processes=2) == 1
    said = capsys.readouterr().err
    assert "[rank 1] rank 1 has no more memory" in said
    assert "rank 1 of 2 ended first, with exit code 1" in said


def test_sigterm_reaches_all_ranks(tmp_path: Path) -> None:
    assert launch(["-c", ENDED, str(tmp_path)], processes=2) == 128 + signal.SIGTERM
    assert {path.name for path in tmp_path.iterdir()} >= {"0", "1"}
