"""`python -m harness efficiency --peers`: our methods beside other people's code for the same, in one process by turns.

Every loop has the same model, first weights, batches and drawn layers. Memory and loss are those of a loop alone; speed
is that of all loops of a method by turns. Nothing is asserted.
"""

from __future__ import annotations

import gc
import importlib.metadata
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from harness.efficiency import overhead_host
from harness.efficiency.arithmetic import PERIOD
from harness.efficiency.budget import Budget
from harness.efficiency.by_turns import Spread, interleaved, ratios, timed_calls
from harness.efficiency.peers.contenders import Bench, Contender
from harness.efficiency.peers.pairs import PAIRS, Pair, Peer
from harness.efficiency.peers.record import PeerRow, PeersRecord, Side
from harness.efficiency.steady import BOUND, Timed, until_steady
from harness.errors import UserError, first_line
from harness.measuring.alone import in_a_fork
from harness.measuring.census import begin_census, live_bytes_outside
from harness.measuring.meters import Meters
from harness.records.code import measurement
from harness.records.provenance import provenance
from harness.step.spec import Shape

GEOMETRY = overhead_host.GEOMETRY.model_copy(update={"vocab_size": 8192, "parameters": 33_694_208})
SHAPE = Shape(batch=1, length=128)
"""Few tokens, so that the optimizer's share of a step is large; on a GPU the host's share."""
STEPS = 30
"""Before the loss is looked at."""
WARMUP = 2 * PERIOD
"""Rounds that are not timed: those in which the first layers' states are allocated."""
UPDATES = 2 * PERIOD
"""Steps in which the update is timed, apart from the others: its clock waits for the device."""


def measure_peers(meters: Meters, budget: Budget, *, least: int, most: int, only: list[str]) -> PeersRecord:
    """Measure every pair, and print each row as it is known.

    Args:
        meters: of this process; they say what the device is.
        budget: no pair is begun after its end; those left out say so.
        least: rounds in which every loop of a method takes one step, at least.
        most: at most.
        only: names of our methods; empty takes all.

    Raises:
        UserError: there is no method of such a name.
    """
    known = [pair.ours for pair in PAIRS]
    for name in only:
        if name not in known:
            raise UserError(f"--only {name}: no such method; there are {', '.join(known)}")
    bench = Bench(geometry=GEOMETRY, shape=SHAPE, device=meters.device)
    if meters.device == "cpu":
        torch.set_num_threads(1)
    chosen = [pair for pair in PAIRS if not only or pair.ours in only]
    # memory first, in forks of a process that has trained nothing: what it had freed would be in theirs
    memory = [_memory(pair, bench) if budget.left() > 0 else None for pair in chosen]
    rows: list[PeerRow] = []
    for pair, found in zip(chosen, memory, strict=True):
        if found is None or budget.left() <= 0:
            rows += [_missing(pair, peer, "the budget was used up") for peer in pair.peers]
            continue
        for row in _rows(pair, found, bench, least=least, most=most):
            print(line(row), flush=True)
            rows.append(row)
    device = meters.describe()
    return PeersRecord(
        device=device,
        geometry=GEOMETRY,
        shape=SHAPE,
        period_steps=PERIOD,
        steps_before_loss=STEPS,
        least_rounds=least,
        most_rounds=most,
        bound=BOUND,
        rows=tuple(rows),
        spent_s=budget.spent(),
        provenance=provenance(
            roots=("harness.efficiency.peers.measure", *(r for pair in PAIRS for r in measurement(pair.module))),
            inputs={},
            device=device.name,
        ),
    )


@dataclass(frozen=True)
class _Found:
    """Memory and loss of the loops of a pair, `ours` and by the peer's name; and why others have none."""

    alone: dict[str, Side]
    missing: dict[str, str]


def _memory(pair: Pair, bench: Bench) -> _Found:
    found = _Found({"ours": _alone(pair.make, bench)}, {})
    for peer in pair.peers:
        try:
            found.alone[peer.name] = _alone(peer.make, bench)
        except (ImportError, RuntimeError, ValueError, AttributeError) as error:
            # other people's code: its failure is a row, not an end
            there = _package(peer) or not peer.package
            found.missing[peer.name] = (
                f"does not run here: {first_line(error)}"
                if there
                else f"not installed (pip install --no-deps {peer.package})"
            )
    return found


def _rows(pair: Pair, found: _Found, bench: Bench, *, least: int, most: int) -> Iterator[PeerRow]:
    alone, missing = found.alone, found.missing
    able = [peer for peer in pair.peers if peer.name not in missing]
    if able:
        timed, updates = _timed(pair, able, bench, least=least, most=most)
    for peer in pair.peers:
        if peer.name in missing:
            yield _missing(pair, peer, missing[peer.name])
        else:
            yield _row(pair, peer, alone, timed, updates, tokens=bench.shape.batch * bench.shape.length)


def _row(
    pair: Pair,
    peer: Peer,
    alone: dict[str, Side],
    timed: Timed,
    updates: dict[str, list[float] | None],
    *,
    tokens: int,
) -> PeerRow:
    judged = timed.judged_s
    mine, theirs = updates["ours"], updates[peer.name]
    width = timed.widths[peer.name]

    def side(name: str) -> Side:
        wall, update = timed.wall_s[name], updates[name]
        return alone[name].model_copy(
            update={
                "step_s": Spread.of(wall) if wall else None,
                "tokens_per_s": tokens / median(wall) if wall else None,
                "update_s": None if update is None else Spread.of(update),
            }
        )

    return PeerRow(
        ours=pair.ours,
        peer=peer.name,
        package=_package(peer),
        note=peer.note,
        our_side=side("ours"),
        peer_side=side(peer.name),
        speed_ratio=Spread.of(ratios(judged[peer.name], judged["ours"])) if timed.rounds else None,
        speed_half_width=width,
        steady=width is not None and width <= BOUND,
        update_ratio=None if mine is None or theirs is None else median(mine) / median(theirs),
        rounds=timed.rounds,
        disturbed_rounds=timed.disturbed,
        disturbed_why=timed.disturbed_why,
    )


def line(row: PeerRow) -> str:
    """A row, for the terminal."""
    named = f"{row.ours} to {row.peer}: "
    if row.missing_why is not None or row.our_side is None or row.peer_side is None:
        return named + str(row.missing_why)
    if row.speed_ratio is None:
        speed = f"tokens/s unknown ({row.disturbed_why})"
    else:
        wide = "" if row.speed_half_width is None else f" ± {row.speed_half_width:.1%}"
        speed = f"tokens/s {row.speed_ratio.median:.3f}{wide}{'' if row.steady else ' (not steady)'}"
    parts = {"update": row.update_ratio, "peak": row.peak_ratio, "state": row.state_ratio}
    shown = (f"{name} {value:.2f}" for name, value in parts.items() if value is not None)
    return f"{named}{speed}, {', '.join(shown)}, loss {row.our_side.loss} and {row.peer_side.loss}"


def _alone(make: Callable[[Bench], Contender], bench: Bench) -> Side:
    """Memory and loss of a loop that has a process, or the device, to itself."""

    def warm() -> None:
        # imports, and what a package compiles or looks for, are no part of its memory
        with _quiet():
            make(bench).step(0)

    _clean()
    if bench.device == "cpu":
        (state, loss), peak = in_a_fork(lambda: _state_and_loss(make, bench), first=warm)
    else:
        warm()
        _clean()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        state, loss = _state_and_loss(make, bench)
        peak = torch.cuda.max_memory_allocated() - before
    return Side(
        step_s=None,
        tokens_per_s=None,
        update_s=None,
        peak_bytes=peak,
        state_bytes=state,
        loss=loss if math.isfinite(loss) else None,
    )


def _state_and_loss(make: Callable[[Bench], Contender], bench: Bench) -> tuple[int, float]:
    begin_census()
    with _quiet():
        contender = make(bench)
        for number in range(STEPS):
            contender.step(number)
        return live_bytes_outside(contender.module), bench.loss(contender, STEPS)


def _timed(
    pair: Pair, peers: list[Peer], bench: Bench, *, least: int, most: int
) -> tuple[Timed, dict[str, list[float] | None]]:
    """Seconds of whole steps, then of what comes after backward, of all loops by turns."""
    _clean()
    with _quiet():
        loops: dict[str, Contender] = {"ours": pair.make(bench)}
        loops |= {peer.name: peer.make(bench) for peer in peers}
        numbers = dict.fromkeys(loops, 0)

        def step(name: str) -> None:
            loops[name].step(numbers[name])
            numbers[name] += 1

        turns = {name: partial(step, name) for name in loops}
        timed = until_steady(turns, device=bench.device, warmup=WARMUP, least=least, most=most)
        inside: dict[str, list[float]] = {name: [] for name in loops}

        def watched(name: str) -> None:
            update = loops[name].update
            if update is None:
                step(name)
                return
            with timed_calls(update[0], [update[1]], device=bench.device) as seconds:
                step(name)
            inside[name].append(seconds[update[1]])

        interleaved({name: partial(watched, name) for name in loops}, warmup=0, rounds=UPDATES)
    return timed, {name: seconds or None for name, seconds in inside.items()}


def _missing(pair: Pair, peer: Peer, why: str) -> PeerRow:
    return PeerRow(ours=pair.ours, peer=peer.name, package=_package(peer), note=peer.note, missing_why=why)


def _package(peer: Peer) -> str | None:
    if peer.package is None:
        return None
    try:
        return f"{peer.package}=={importlib.metadata.version(peer.package)}"
    except importlib.metadata.PackageNotFoundError:
        return None


def _clean() -> None:
    gc.unfreeze()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of other people's code, and of random weights (their layers matter alike)."""
    with warnings.catch_warnings(action="ignore"):
        yield
