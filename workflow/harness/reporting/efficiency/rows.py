"""The forecast and measured figures of each cell, and the only function that divides one figure by another.

A ratio is meaningful only between cells that differ in nothing but their method. So figures carry their conditions, and
`ratio` refuses two figures with different settings, model, shape or card, or a forecast and a measurement.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from harness.efficiency.order import Corner
from harness.efficiency.plan import Entry, every_group
from harness.efficiency.record import CellRecord, ForecastRecord, Named, TimingBlock
from harness.efficiency.spec import EfficiencyStudy, variant_name
from harness.efficiency.store import Store, is_stale

Source = Literal["measured", "forecast"]
Quantity = Literal["peak memory", "tokens per second", "bound on tokens per second"]


class UnlikeError(ValueError):
    """Two figures that must not be compared."""


@dataclass(frozen=True)
class Conditions:
    """The conditions that two figures must share, so that their ratio compares the methods."""

    model: str
    settings: str
    batch: int
    length: int
    quantity: Quantity
    source: Source
    device: str
    """Name of the card; empty for a forecast."""
    repeat: int | None = None
    """Number of the repeat that a figure is from: repeats are interleaved, so figures are compared within a repeat."""


@dataclass(frozen=True)
class Figure:
    """A number and its conditions."""

    value: float
    under: Conditions


def ratio(part: Figure | None, whole: Figure | None) -> float | None:
    """`part` divided by `whole`; None if either is unknown.

    Raises:
        UnlikeError: their conditions differ in anything but the method.
    """
    if part is None or whole is None:
        return None
    if part.under != whole.under:
        raise UnlikeError(f"figures under unlike conditions have no ratio: {part.under} and {whole.under}")
    return part.value / whole.value


@dataclass(frozen=True)
class Row:
    """One cell with its forecast and measurements."""

    entry: Entry
    timed: bool
    forecast: ForecastRecord | None
    measured: CellRecord | None
    """Record of a measurement on a GPU."""
    rehearsed: CellRecord | None
    """Record of a rehearsal on a CPU: it proves that the program works, and says nothing about a GPU."""
    also_on: tuple[str, ...] = ()
    """Other cards that the cell was measured on; a group of cells is shown on one card."""

    @property
    def named(self) -> Named:
        """The cell's labels."""
        return self.entry.named

    @property
    def stale(self) -> bool:
        """Measured by other code than today's."""
        return self.measured is not None and is_stale(self.measured, self.entry.cell)

    @property
    def rehearsal_stale(self) -> bool:
        """Whether other code than today's made the rehearsal."""
        return self.rehearsed is not None and is_stale(self.rehearsed, self.entry.cell)

    @property
    def forecast_stale(self) -> bool:
        """Forecast by other code than today's."""
        return self.forecast is not None and is_stale(self.forecast, self.entry.cell)

    @property
    def group(self) -> tuple[str, str, str]:
        """Labels that the compared cells share: model, settings, shape."""
        return _group(self.named)

    def peak(self, source: Source) -> Figure | None:
        """Peak of allocated device memory, in bytes."""
        if source == "forecast":
            value = None if self.forecast is None else self.forecast.peak_bytes
        else:
            memory = None if self.measured is None else self.measured.memory
            value = None if memory is None else memory.allocated_peak_bytes
        return None if value is None else Figure(value, self._conditions("peak memory", source))

    def bound(self) -> Figure | None:
        """Bound on tokens per second from arithmetic, if all methods are equally efficient; not measured."""
        value = None if self.forecast is None else self.forecast.bound_tokens_per_s
        return None if value is None else Figure(value, self._conditions("bound on tokens per second", "forecast"))

    def speeds(self) -> list[Figure]:
        """Tokens per second on a GPU, one figure a repeat."""
        return [
            Figure(block.tokens_per_s, self._conditions("tokens per second", "measured", block.repeat))
            for block in self.blocks
        ]

    @property
    def blocks(self) -> tuple[TimingBlock, ...]:
        """Timing blocks on a GPU."""
        return () if self.measured is None else self.measured.timing

    @property
    def speed(self) -> float | None:
        """Median of the repeats' tokens per second, on a GPU."""
        return median(figure.value for figure in self.speeds()) if self.blocks else None

    def speed_ratios(self, whole: Row | None) -> list[float]:
        """Speed of this row divided by that of `whole`, repeat by repeat; empty if no repeat has both.

        Raises:
            UnlikeError: the rows' conditions differ.
        """
        if whole is None:
            return []
        others = {figure.under.repeat: figure for figure in whole.speeds()}
        pairs = [(mine, others[mine.under.repeat]) for mine in self.speeds() if mine.under.repeat in others]
        return [found for mine, other in pairs if (found := ratio(mine, other)) is not None]

    def _conditions(self, quantity: Quantity, source: Source, repeat: int | None = None) -> Conditions:
        device = "" if source == "forecast" or self.measured is None else self.measured.device.name
        shape = self.entry.cell.shape
        return Conditions(
            model=self.named.model,
            settings=self.named.settings,
            batch=shape.batch,
            length=shape.length,
            quantity=quantity,
            source=source,
            device=device,
            repeat=repeat,
        )


class Rows:
    """All rows of a study, in the order of the plan."""

    def __init__(self, study: EfficiencyStudy, rows: Iterable[Row]) -> None:
        self.study = study
        self.all: Sequence[Row] = list(rows)
        self._by_name = {row.named.name: row for row in self.all}

    def __iter__(self) -> Iterator[Row]:
        return iter(self.all)

    def get(self, model: str, settings: str, shape: str, method: str, variant: str = "") -> Row | None:
        """The row with these labels."""
        named = Named(model=model, settings=settings, shape=shape, method=method, variant=variant)
        return self._by_name.get(named.name)

    @property
    def methods(self) -> list[str]:
        """All methods, in the order of the plan."""
        return list(dict.fromkeys(row.named.method for row in self.all))

    def known(self, model: str, settings: str, shape: str) -> list[Row]:
        """One row a method, only those that were forecast or measured."""
        found = [self.get(model, settings, shape, method) for method in self.methods]
        return [row for row in found if row is not None and (row.forecast or row.measured)]

    def beside(self, row: Row, method: str, variant: str = "") -> Row | None:
        """Another method's row of the same group."""
        return self.get(*row.group, method, variant)

    def resident(self, row: Row) -> Row | None:
        """The same cell with its moments on the device."""
        return self.beside(row, row.named.method, variant_name(self.study.resident)) if self.study.resident else None

    def in_corners(self, model: str) -> list[tuple[Corner, list[Row]]]:
        """The corners in which a model has forecasts or measurements, with the rows that have them."""
        found = [(corner, self.known(model, corner.settings, corner.shape)) for corner in self.study.corners]
        return [(corner, rows) for corner, rows in found if rows]

    def in_groups(self) -> list[Row]:
        """Rows sorted by model and settings in the plan's order, then batch and length, then methods in plan order."""
        models, settings = ([getattr(row.named, key) for row in self.all] for key in ("model", "settings"))

        def place(row: Row) -> tuple[int, int, int, int]:
            shape = row.entry.cell.shape
            return models.index(row.named.model), settings.index(row.named.settings), shape.batch, shape.length

        return sorted(self.all, key=place)


def read_rows(study: EfficiencyStudy, store: Store) -> Rows:
    """Join the plan with the records and forecasts on disk.

    Stale records are included: a table shows what was measured, and marks which code made it; a session decides whether
    to measure again. Cells that are compared are shown on one card: the one that most of them were measured on, and
    among equals the one used last.
    """
    groups = every_group(study)
    measured = {e.named.name: store.measured(e, "cuda") for group in groups for e in group.entries}
    card_of = _cards([record for found in measured.values() for record in found])

    def row(entry: Entry, timed: bool) -> Row:
        mine, card = measured[entry.named.name], card_of.get(_group(entry.named))
        rehearsed = store.measured(entry, "cpu")
        return Row(
            entry=entry,
            timed=timed,
            forecast=store.forecast(entry),
            measured=next((record for record in reversed(mine) if record.device.name == card), None),
            rehearsed=rehearsed[-1] if rehearsed else None,
            also_on=tuple(sorted({record.device.name for record in mine} - {card})),
        )

    return Rows(study, (row(entry, group.timed) for group in groups for entry in group.entries))


def _cards(records: Sequence[CellRecord]) -> dict[tuple[str, str, str], str]:
    """The card that each group of cells is shown on, by model, settings and shape."""
    groups: dict[tuple[str, str, str], dict[str, dict[str, str]]] = {}
    for record in sorted(records, key=lambda record: record.provenance.started_utc):
        seen = groups.setdefault(_group(record.cell), {}).setdefault(record.device.name, {})
        seen[record.cell.name] = record.provenance.started_utc
    return {
        group: max(cards, key=lambda card: (len(cards[card]), max(cards[card].values())))
        for group, cards in groups.items()
    }


def _group(named: Named) -> tuple[str, str, str]:
    return named.model, named.settings, named.shape
