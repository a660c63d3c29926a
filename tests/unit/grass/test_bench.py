"""`python -m grass.bench`: it runs, its ratios are of like with like, and its figures can be read."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from house import ROOT

from grass.bench import device as device_part
from grass.bench.__main__ import main
from grass.bench.comparison import Budget, compare, measure_device
from grass.bench.device import VARIANTS, Cell, DeviceBench, DeviceSettings, cells, worst_draws
from grass.bench.figures import interleaved, ratios, summary
from grass.bench.host import HostSettings, _Training
from grass.bench.stand_ins import SerialHost, serial_copies
from grass.host import current

TINY_HOST = ["--layers", "2", "--width", "32", "--tokens", "4", "--step-rounds", "2", "--periods", "1"]
TINY_DEVICE = ["--device", "cpu", "--geometry", "tiny", "--batch", "1", "--length", "8", "--warmup", "1"]
TINY_DEVICE += ["--timed", "2", "--period", "2", "--rounds", "1"]


def settings(**changed: Any) -> DeviceSettings:
    tiny = {"batch": 1, "length": 8, "warmup": 1, "timed": 2, "period": 2, "rounds": 1, "budget_s": 60.0}
    return DeviceSettings(device="cpu", geometry="tiny", **{**tiny, **changed})


Run = tuple[str, dict[str, Any]]
"""What a part prints, and what it writes."""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The host part at the smallest sizes, in a process of its own: it changes how memory is freed."""
    path = tmp_path_factory.mktemp("bench") / "figures.json"
    command = [sys.executable, "-m", "grass.bench", "--parts", "host", *TINY_HOST, "--json", str(path)]
    root = ROOT
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads(path.read_text(encoding="utf-8"))["host"]


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The device part, rehearsed on the CPU for the most important setting."""
    path = tmp_path_factory.mktemp("bench") / "figures.json"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(device_part, "SETTINGS", device_part.SETTINGS[:1])
        assert main(["--parts", "device", *TINY_DEVICE, "--json", str(path)]) == 0
    return printed.getvalue(), json.loads(path.read_text(encoding="utf-8"))["device"]


def test_the_host_part_prints_a_ratio_for_every_situation(host: Run) -> None:
    lines = host[0].splitlines()
    for active, clip in itertools.product((2, 1), ("off", "on")):
        (line,) = [a for a in lines if f"step, {active} of 2 layers, clipping {clip}, freed memory as found" in a]
        assert "over AdamW foreach=False" in line
    for heading in ("bookkeeping, share of a step", "importance / uniform", "a batch of a probe / a step"):
        assert sum(heading in line for line in lines) == 1


def test_the_device_part_prints_its_ratios_beside_the_target(device: Run) -> None:
    lines = device[0].splitlines()
    assert sum("speed / resident" in line for line in lines) == 1
    assert [line.split()[2] for line in lines if line.split()[:2] == ["2", "bf16"]] == list(VARIANTS)
    assert "target, 2 layers, bf16 moments: move / resident at least 0.98 with at most 14.7 GiB" in lines[-1]


def test_figures_say_where_they_come_from(host: Run, device: Run) -> None:
    for _, written in (host, device):
        assert written["provenance"]["torch"] == torch.__version__
        assert written["provenance"]["threads"] == 1
        assert {"device", "date", "commit"} <= written["provenance"].keys()


def test_the_host_part_writes_every_number(host: Run) -> None:
    assert len(host[1]["steps"]) in (4, 8)  # 8 where the C library can be told to keep freed memory
    for row in host[1]["steps"]:
        assert row["grass_step"]["median_s"] > 0
        assert row["grass_step"]["count"] == 2
        assert set(row["grass_over_adamw"]) == {"foreach=False", "default", "fused"}
    book = host[1]["bookkeeping"]
    assert 0 < book["bookkeeping_share"]["median"] < 1
    by_method = sum(share["median"] for share in book["bookkeeping_share_by_method"].values())
    assert by_method == pytest.approx(book["bookkeeping_share"]["median"])


def test_the_device_part_writes_every_number(device: Run) -> None:
    assert device[1]["not_measured"] == []
    assert device[1]["copy_rates"] is None
    assert len(device[1]["cells"]) == 2 * len(VARIANTS)
    for row in device[1]["cells"]:
        assert row["reason"] is None
        # a CPU has no allocator that counts, and its resident set is no device memory
        assert row["allocated_peak_bytes"] is None
        assert row["mode"] == ("resident" if row["variant"] == "resident" else "move")
        if row["round"] is not None:
            assert len(row["step_s"]) == row["timed_steps"] == 2
            assert sum(row["step_s"]) == pytest.approx(row["window_s"])
            assert row["tokens_per_s"] == pytest.approx(2 * 8 / row["window_s"])
            assert row["exposed_copy_s"] >= 0
            assert (row["moved_bytes"] > 0) == (row["mode"] == "move")


def test_all_variants_train_the_same_layers(device: Run) -> None:
    timed = [row["active"] for row in device[1]["cells"] if row["round"] == 0]
    assert len(timed) == len(VARIANTS)
    assert all(active == timed[0] for active in timed)
    assert len({tuple(active) for active in timed[0]}) == 2  # the window holds a draw


def test_both_samplers_of_the_bookkeeping_train_the_same_layers() -> None:
    sizes = HostSettings(layers=4, width=32, tokens=4)
    mine, plain = _Training(sizes, "importance"), _Training(sizes, "uniform")
    for _ in range(21):
        mine.step()
        plain.step()
    sets = [[record.active for record in training.opt.history] for training in (mine, plain)]
    assert sets[0] == sets[1]
    assert {(0, 2), (1, 3)} == set(sets[0])
    assert mine.opt.importance is not None
    assert set(mine.opt.importance.measured_at) == {10, 20}


def test_without_cuda_the_device_part_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--parts", "device", "--json", str(tmp_path / "figures.json")]) == 0
    assert capsys.readouterr().out == "device: not measured: no CUDA device\n"
    assert json.loads((tmp_path / "figures.json").read_text()) == {"device": {"not_measured": ["no CUDA device"]}}


def test_a_window_that_is_no_whole_number_of_periods_is_refused(capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["--timed", "70", "--period", "50"])
    assert "--timed must be a multiple of --period (50), not 70" in capsys.readouterr().err


def test_contenders_take_turns_and_the_order_turns_round() -> None:
    calls: list[str] = []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = interleaved(contenders, warmup=1, rounds=2)
    assert calls == list("abccbaabc")
    assert {name: len(found) for name, found in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_summary_of_known_values() -> None:
    assert summary([3.0], "_s") == {
        "least_s": 3.0, "low_quartile_s": 3.0, "median_s": 3.0, "high_quartile_s": 3.0, "p95_s": 3.0, "most_s": 3.0,
        "count": 1,
    }  # fmt: skip
    found = summary([float(n) for n in range(101)])
    assert [found[key] for key in ("low_quartile", "median", "high_quartile", "p95")] == [25, 50, 75, 95]
    assert ratios([2, 6], [1, 2]) == [2, 3]


def test_the_peak_and_the_speed_of_the_headline_come_first() -> None:
    order = list(cells(2))
    assert order[:3] == [Cell(2, "bf16", variant, None) for variant in VARIANTS]
    assert [cell.variant for cell in order[3:9]] == [*VARIANTS, *reversed(VARIANTS)]
    assert len(order) == len(set(order)) == 4 * 3 * 3


@pytest.mark.parametrize("active", [1, 2, 4])
def test_every_worst_draw_makes_backward_visit_all_layers(active: int) -> None:
    for draw in worst_draws(6, active):
        assert draw[0] == 0
        assert len(set(draw)) == active


def test_a_cell_that_would_not_end_in_time_is_not_begun(capsys: Any) -> None:
    budget = Budget(100.0)
    assert budget.fits(10**6)  # nothing is known yet
    budget.took(8, 16.0)
    assert budget.fits(40)
    assert not budget.fits(60)
    budget.took(60, 60.0)
    assert budget.fits(60)
    found = measure_device(settings(budget_s=0.0))
    assert found["cells"] == found["comparison"] == []
    assert len(found["not_measured"]) == len(list(cells(1)))
    assert "not measured, the budget of 0 s is used up: 2 layers, bf16 moments, move, peak" in capsys.readouterr().out


def test_a_cell_without_enough_memory_is_a_row_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = DeviceBench(settings())
    hooks = [len(module._forward_pre_hooks) for module in bench.model.modules()]
    step, calls = DeviceBench._step, []

    def exhausted(self: DeviceBench, opt: Any, tokens: Any) -> None:
        step(self, opt, tokens)
        calls.append(opt)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nSecond line")

    monkeypatch.setattr(DeviceBench, "_step", exhausted)
    failed, done = (bench.measure(Cell(2, "bf16", "move", number)) for number in range(2))
    assert failed["reason"] == "out of memory: CUDA out of memory. Tried to allocate 1 GiB."
    assert done["reason"] is None
    # the failed optimizer must not go on acting on the next one's steps
    assert [len(module._forward_pre_hooks) for module in bench.model.modules()] == hooks
    line = next(line for line in compare([failed, done]) if line["variant"] == "move")
    assert line["reasons"] == [failed["reason"]]
    assert line["tokens_per_s"]["count"] == 1


def test_speeds_are_compared_within_a_round() -> None:
    def row(variant: str, number: int, window: float) -> dict[str, Any]:
        same = {"active_layers": 2, "state_dtype": "bf16", "reason": None, "timed_steps": 2, "exposed_copy_s": 0.5}
        times = {"window_s": window, "step_s": [window / 2] * 2, "tokens_per_s": 100 / window}
        return {**same, **times, "variant": variant, "round": number}

    rows = [row("resident", 0, 1.0), row("resident", 1, 10.0), row("move", 0, 2.0), row("move", 1, 10.0)]
    resident, move = compare(rows)
    assert resident["speed_over_resident"]["least"] == resident["speed_over_resident"]["most"] == 1
    assert (move["speed_over_resident"]["least"], move["speed_over_resident"]["most"]) == (0.5, 1.0)
    assert move["speed_over_resident_by_step"]["count"] == 4
    assert move["exposed_copy_per_step"]["median_s"] == 0.25
    # without a resident run there is a speed, but no ratio
    (alone,) = compare(rows[2:])
    assert alone["tokens_per_s"] is not None
    assert alone["speed_over_resident"] is None


def test_copies_are_serial_only_while_asked() -> None:
    usual, device = current(), torch.device("cuda")
    with serial_copies():
        assert isinstance(current(), SerialHost)
        assert current().allocated_bytes(device) is None
    assert current() is usual


def test_the_geometry_is_that_of_llama_2_7b() -> None:
    shape = device_part.GEOMETRIES["llama2-7b"]
    width, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    per_layer = 4 * width**2 + 3 * width * inner + 2 * width
    # the published number of parameters
    assert layers * per_layer + 2 * shape["vocab_size"] * width + width == 6_738_415_616
