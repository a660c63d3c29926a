"""`--peers`: ours and other people's loops do the same, memory is seen from outside, and what is missing is a row."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from efficiency_data import NO_TIME as TINY
from further import a_few
from harness.__main__ import main
from harness.efficiency.peers import contenders, loops, measure
from harness.efficiency.peers.contenders import Bench, Loop, Ours
from harness.efficiency.peers.pairs import PAIRS, Pair, Peer
from harness.efficiency.peers.record import PeersRecord
from harness.records.reading import read
from harness.reporting.efficiency.peers_table import peers_tables
from harness.step.spec import Shape

BENCH = Bench(geometry=TINY, shape=Shape(batch=1, length=16), device="cpu")
BY_NAME = {pair.ours: pair for pair in PAIRS}
OF_THE_COMMAND = ("full", "lora")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, steps in (("STEPS", 6), ("WARMUP", 1), ("UPDATES", 1)):
        monkeypatch.setattr(measure, name, steps)


def small(pair: Pair) -> Pair:
    """The pair with a rank that this model has room for."""
    return replace(pair, options={**pair.options, **({"rank": 4} if "rank" in pair.options else {})})


def rows_of(pair: Pair) -> list[Any]:
    return list(measure._rows(pair, measure._memory(pair, BENCH), BENCH, least=1, most=1))


def losses(contender: Any, steps: int = 17) -> list[float]:
    found = []
    for number in range(steps):
        contender.step(number)
        found.append(BENCH.loss(contender, number))
    return found


@pytest.mark.parametrize(
    ("ours", "peer"),
    [
        ("full", "torch AdamW, fused"),
        ("lisa, moments kept", "LISA loop of LMFlow"),
        ("grass, embedding and head on", "LISA loop of LMFlow"),
    ],
)
def test_the_loops_do_the_same_to_the_last_bit(ours: str, peer: str) -> None:
    """Across three draws: same weights at first, same batches, same layers, the same AdamW, the same clipping."""
    pair = BY_NAME[ours]
    (other,) = [p for p in pair.peers if p.name == peer]
    assert losses(pair.make(BENCH)) == losses(other.make(BENCH))


def test_a_loop_that_draws_other_layers_is_seen_by_its_loss() -> None:
    other = replace(BENCH, active_layers=3)
    assert losses(BY_NAME["lisa, moments kept"].make(BENCH)) != losses(loops.lisa(other, clip=1.0, fused=True))


def test_lmflows_loop_freezes_and_never_drops() -> None:
    """After all draws every layer has moments, although two of four train."""
    loop = loops.lisa(BENCH, clip=1.0, fused=True)
    for number in range(12):
        loop.step(number)
    layers = loop.module.model.layers  # type: ignore[union-attr]
    drawn = {n for step in range(12) for n in BENCH.drawn(step)}
    for number, layer in enumerate(layers):  # type: ignore[arg-type]
        assert (layer.mlp.up_proj.weight in loop._optimizer.state) is (number in drawn)
        assert layer.mlp.up_proj.weight.requires_grad is (number in BENCH.drawn(11))


@pytest.mark.parametrize(
    "pair",
    # those that the test of the command does not measure
    a_few([pair for pair in PAIRS if pair.ours not in OF_THE_COMMAND], one_in=3),
    ids=lambda pair: pair.ours,
)
def test_every_peer_of_the_table_is_measured_or_says_why_not(pair: Pair) -> None:
    for row in rows_of(small(pair)):
        if row.missing_why is not None:
            assert row.peer in ("galore-torch", "apollo-torch", "bitsandbytes AdamW8bit", "torchao AdamW8bit")
            assert "install" in row.missing_why or "No module named" in row.missing_why
            continue
        assert row.our_side.state_bytes > 0
        assert row.our_side.peak_bytes > 0
        assert row.our_side.loss is not None
        assert (row.update_ratio is None) is (pair.ours == "adalomo")


def test_state_is_counted_from_outside() -> None:
    """AdamW's two moments and its step counts; kept moments of LISA against those of the layers that train now."""
    fused = tuple(peer for peer in BY_NAME["full"].peers if peer.name == "torch AdamW, fused")
    (full,) = rows_of(replace(BY_NAME["full"], peers=fused))
    parameters = TINY.parameters * 8
    assert parameters <= full.our_side.state_bytes < parameters + 2000
    assert parameters <= full.peer_side.state_bytes < parameters + 2000
    (reset,) = rows_of(BY_NAME["lisa, moments reset"])
    assert reset.state_ratio < 0.8


class Hoards(Loop):
    """Keeps 64 MiB that nobody needs, once it trains."""

    def step(self, number: int) -> None:
        super().step(number)
        self.kept = torch.ones(16 * 2**20)


def test_a_loop_that_hoards_is_seen() -> None:
    def hoards(bench: Bench) -> Hoards:
        model = bench.model()
        return Hoards(bench, model, torch.optim.AdamW(model.parameters(), fused=True), clip=None)

    plain = measure._alone(BY_NAME["full"].make, BENCH)
    found = measure._alone(hoards, BENCH)
    assert found.peak_bytes is not None
    assert plain.peak_bytes is not None
    assert found.peak_bytes - plain.peak_bytes > 60 * 2**20
    assert found.state_bytes - plain.state_bytes > 60 * 2**20


def test_a_package_that_is_not_there_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "badam", None)
    (row,) = rows_of(BY_NAME["badam"])
    assert row.missing_why is not None
    assert row.speed_ratio is None


def test_a_package_that_fails_is_a_row_with_its_words() -> None:
    def breaks(bench: Bench) -> Loop:
        raise RuntimeError("no kernel for this device\nand more")

    pair = Pair(ours="full", module="full", peers=(Peer(name="broken", make=breaks),))
    (row,) = rows_of(pair)
    assert row.missing_why == "does not run here: no kernel for this device"


def test_our_own_failure_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(self: Ours, number: int) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(contenders.Ours, "step", breaks)
    with pytest.raises(RuntimeError, match="a bug"):
        rows_of(BY_NAME["full"])


def test_the_command_writes_a_record_and_a_table_is_made_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "GEOMETRY", TINY)
    monkeypatch.setattr(measure, "SHAPE", Shape(batch=1, length=16))
    words = ["efficiency", "--peers", "--device", "cpu", "--steps", "5", "--out", str(tmp_path)]
    assert main([*words, *(word for name in OF_THE_COMMAND for word in ("--only", name))]) == 0
    said = capsys.readouterr().err
    (path,) = (tmp_path / "peers").glob("*.json")
    assert str(path) in said
    record = read(path, PeersRecord)
    assert [row.ours for row in record.rows] == ["full"] * 3 + ["lora"] * 2
    (table,) = peers_tables(tmp_path / "peers")
    assert (tmp_path / "peers" / "peers.md").read_text(encoding="utf-8") == table.markdown()
    assert list(table.display["peer"].str.startswith(("torch AdamW", "peft under torch AdamW"))) == [True] * 5
    assert "equal to the bit" in set(table.display["loss"])
    text = table.markdown()
    assert "1 thread" in text
    for row in record.rows:
        assert row.note in text


def test_an_unknown_method_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["efficiency", "--peers", "--device", "cpu", "--out", str(tmp_path), "--only", "gras"]) == 2
    assert "--only gras: no such method; there are full, lisa, moments kept" in capsys.readouterr().err
