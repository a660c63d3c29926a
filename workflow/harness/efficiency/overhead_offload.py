"""What moving optimizer states costs: `move`, and `move` whose copies all stand in the way of computing, beside
`resident`.

All variants meet the same draws, so repeat by repeat and step by step they do the same work. A CPU rehearses this on a
tiny model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

from grass.host import current, using
from harness.efficiency.budget import Budget, Estimates
from harness.efficiency.by_turns import Spread, ratios
from harness.efficiency.jobs import Reply
from harness.efficiency.measure import execute
from harness.efficiency.plan import Entry, Unit
from harness.efficiency.record import Block, MemoryBlock, Named, TimingBlock
from harness.efficiency.serial import SerialHost
from harness.efficiency.session import NO_TIME, block_words, job_of
from harness.efficiency.spec import EfficiencyStudy, OffloadCell, cell_of, variant_name
from harness.efficiency.store import MeasureOptions
from harness.measuring.meters import Meters
from harness.records.device import DeviceKind, DeviceRecord, StrictRecord
from harness.records.measured import TransferRates
from harness.records.units import GIB
from harness.step.spec import Shape

Variant = Literal["resident", "move", "serial"]
VARIANTS: tuple[Variant, ...] = ("resident", "move", "serial")
"""`serial` is `move` whose copies all stand in the way of computing."""
REHEARSAL = Shape(batch=1, length=64)
"""Instead of the study's shape on a CPU, which shows no more than that everything works."""


class OffloadCost(StrictRecord):
    """One way of keeping states, beside `resident` under the same draws."""

    variant: Variant
    active_layers: int
    memory: MemoryBlock | None
    timing: tuple[TimingBlock, ...]
    not_measured: tuple[str, ...]
    speed_over_resident_ratio: Spread | None
    step_speed_over_resident_ratio: Spread | None
    ratio_why: str | None


class OffloadPart(StrictRecord):
    """What moving states costs on the device."""

    rehearsal: bool
    model: str
    settings: str
    shape: Shape
    variants: tuple[OffloadCost, ...]


@dataclass
class VariantRun:
    """A variant, and what is known of it so far."""

    variant: Variant
    active_layers: int
    entry: Entry
    memory: MemoryBlock | None = None
    timing: list[TimingBlock] = field(default_factory=list)
    not_measured: list[str] = field(default_factory=list)
    over: bool = False
    """It cannot run, or has no room: nothing more is tried."""

    @property
    def words(self) -> str:
        """For people."""
        return f"{self.active_layers} layers, {self.variant}"

    def copies(self) -> AbstractContextManager[None]:
        """Inside, states are copied as the variant has it."""
        return using(SerialHost(current())) if self.variant == "serial" else nullcontext()


def variant_runs(study: EfficiencyStudy, chosen: OffloadCell, device: DeviceKind, active: int) -> list[VariantRun]:
    """All variants with this number of active layers, `resident` first.

    Raises:
        UserError: the method lacks their options.
    """
    shape = study.shape(chosen.shape) if device == "cuda" else REHEARSAL
    model = study.anchor.of(device)
    cell = cell_of(study, model=model, method=chosen.method, settings=chosen.settings, shape=shape)
    runs = []
    for variant in VARIANTS:
        options = {"active_layers": active, **(study.resident if variant == "resident" else {})}
        named = Named(
            model=model,
            settings=chosen.settings,
            shape=f"{shape.batch}x{shape.length}",
            method=chosen.method,
            variant=variant_name(options),
        )
        runs.append(VariantRun(variant, active, Entry(named, cell.with_options(**options))))
    return runs


class OffloadBench:
    """Measures the variants by turns, until there is no time left.

    Args:
        chosen: what is compared, and its goals.
        meters: of this process.
        asked: of each variant.
        budget: no block is begun that may not fit.
    """

    def __init__(self, chosen: OffloadCell, meters: Meters, asked: MeasureOptions, budget: Budget) -> None:
        self._chosen, self._meters, self._asked, self._budget = chosen, meters, asked, budget
        self._estimates = Estimates()
        self._unclean: str | None = None
        """The block after which the device was not as before: no later peak would be its own."""

    def measure(self, runs: Sequence[Sequence[VariantRun]], device: DeviceRecord) -> OffloadPart:
        """Of each group the peaks, then the timed repeats, every other one in the reverse order; prints as it goes.

        Args:
            runs: groups of variants that are compared, `resident` first in each.
            device: where, for people.
        """
        entry = runs[0][0].entry
        rehearsal = device.kind == "cpu"
        print(f"offload: what moving states costs on {device.name}, {entry.named.model}, {entry.named.shape} tokens")
        if rehearsal:
            print("  a rehearsal on a CPU, which shows that it runs and nothing of a GPU")
        if device.transfer is not None:
            print(f"  pinned copies: {_rates(device.transfer)}", flush=True)
        for together in runs:
            for run in together:
                self._block(run, "memory")
            for repeat in range(self._asked.repeats):
                for run in together[:: -1 if repeat % 2 else 1]:
                    self._block(run, "timing", repeat)
        costs = tuple(cost_of(run, beside=together[0]) for together in runs for run in together)
        for cost in costs:
            print(f"  {_said(cost)}")
        if not rehearsal:
            print(f"  {_target(costs, self._chosen)}", flush=True)
        return OffloadPart(
            rehearsal=rehearsal,
            model=entry.named.model,
            settings=entry.named.settings,
            shape=entry.cell.shape,
            variants=costs,
        )

    def _block(self, run: VariantRun, do: Block, repeat: int = 0) -> None:
        if run.over:
            return
        unit = Unit(run.entry, do, repeat)
        words = block_words(unit, self._asked)
        if self._unclean is not None:
            why: str | None = f"{self._unclean} left memory behind on the device"
        elif not self._budget.allows(self._estimates.of(unit)):
            why = NO_TIME
        else:
            began = time.monotonic()
            with run.copies():
                reply = execute(job_of(unit, self._asked), self._meters)
            self._estimates.add(unit, time.monotonic() - began)
            why = _keep(run, reply)
            if not reply.clean:
                self._unclean = f"{run.words}, {words}"
        if why is not None:
            run.not_measured.append(f"{words}: {why}")
        print(f"  {run.words}, {words}: {_figure(run, do) if why is None else f'not measured ({why})'}", flush=True)


def _keep(run: VariantRun, reply: Reply) -> str | None:
    """Keep what was measured; the reason where nothing was."""
    if reply.status != "ok":
        run.over = True
        return f"{'out of memory' if reply.status == 'oom' else reply.status} {reply.why}"
    if reply.memory is not None:
        run.memory = reply.memory
    if reply.timing is not None:
        run.timing.append(reply.timing)
    return reply.why


# ------------------------------------------------------------ what came of it


def cost_of(run: VariantRun, *, beside: VariantRun) -> OffloadCost:
    """A variant with its ratios to another one, repeat by repeat.

    Args:
        run: of which nothing more is to come.
        beside: `resident`, under the same draws.
    """
    resident = {block.repeat: block for block in beside.timing}
    pairs = [(block, resident[block.repeat]) for block in run.timing if block.repeat in resident]
    by_repeat = [mine.tokens_per_s / other.tokens_per_s for mine, other in pairs]
    by_step = [ratio for mine, other in pairs for ratio in ratios(other.step_s, mine.step_s)]
    return OffloadCost(
        variant=run.variant,
        active_layers=run.active_layers,
        memory=run.memory,
        timing=tuple(sorted(run.timing, key=lambda block: block.repeat)),
        not_measured=tuple(run.not_measured),
        speed_over_resident_ratio=Spread.of(by_repeat) if pairs else None,
        step_speed_over_resident_ratio=Spread.of(by_step) if pairs else None,
        ratio_why=None if pairs else "no repeat was timed beside resident",
    )


def _rates(transfer: TransferRates) -> str:
    ways = {
        "to the device": transfer.host_to_device_bytes_per_s,
        "from it": transfer.device_to_host_bytes_per_s,
        "both at once": transfer.both_ways_bytes_per_s,
    }
    return ", ".join(f"{way} {rate:.3e} bytes/s" for way, rate in ways.items() if rate is not None)


def _figure(run: VariantRun, do: Block) -> str:
    """What was measured last."""
    if do == "timing":
        return f"{run.timing[-1].tokens_per_s:,.0f} tokens/s"
    assert run.memory is not None
    return _peak(run.memory)


def _peak(memory: MemoryBlock) -> str:
    if memory.allocated_peak_bytes is None:
        return f"no device memory ({memory.device_why})"
    return f"allocated peak {memory.allocated_peak_bytes / GIB:.3f} GiB in {memory.peak_phase}"


def _said(cost: OffloadCost) -> str:
    said = []
    if cost.timing:
        speed = Spread.of([block.tokens_per_s for block in cost.timing])
        said.append(f"{speed.median:,.0f} tokens/s")
    if cost.speed_over_resident_ratio is None or cost.step_speed_over_resident_ratio is None:
        said.append(f"no ratio: {cost.ratio_why}")
    elif cost.variant != "resident":
        said.append(f"speed / resident {cost.speed_over_resident_ratio.text('.4f')} repeat by repeat")
        said.append(f"{cost.step_speed_over_resident_ratio.text('.4f')} step by step")
    exposed = [b.exposed_copy_s_per_step for b in cost.timing if b.exposed_copy_s_per_step is not None]
    if exposed and cost.variant != "resident":
        said.append(f"{1000 * Spread.of(exposed).median:.2f} ms a step wait for copies")
    if cost.memory is not None and cost.memory.allocated_peak_bytes is not None:
        said.append(_peak(cost.memory))
    said += [f"not measured: {line}" for line in cost.not_measured]
    return f"{cost.active_layers} layers, {cost.variant}: {'; '.join(said)}"


def _target(costs: tuple[OffloadCost, ...], chosen: OffloadCell) -> str:
    move = next(cost for cost in costs if cost.variant == "move")
    speed = move.speed_over_resident_ratio
    peak = None if move.memory is None else move.memory.allocated_peak_bytes
    return (
        f"target, {move.active_layers} layers: move / resident at least {chosen.least_speed} with at most "
        f"{chosen.most_gib} GiB allocated; this run: {'no ratio' if speed is None else format(speed.median, '.4f')}"
        f", {'no peak' if peak is None else format(peak / GIB, '.3f') + ' GiB'}"
    )
