"""Records on disk: earlier measurements and forecasts are never overwritten, and the record that fits is looked up.

There is one file for each cell with its measuring options, card and code: `<labels>--<asked>--<card>--<code>.json`.
`asked` and `code` are the first 8 digits of the record's own hashes, and a forecast's card is `forecast`. Another
option, number of repeats, card or version of the code adds a file. The code is identified by its hash and not by a
running number, so that folders filled on several machines can be merged.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol, TypeVar, get_args

from harness.efficiency.jobs import Reply
from harness.efficiency.plan import Entry, Unit
from harness.efficiency.record import NOT_YET, Block, CellRecord, ForecastRecord, Named, Predicted
from harness.records import atomic
from harness.records.code import code_of, measurement, step_forecast
from harness.records.device import DeviceKind, DeviceRecord
from harness.records.provenance import provenance
from harness.records.reading import read
from harness.records.record import Provenance
from harness.step.spec import Cell

R = TypeVar("R", CellRecord, ForecastRecord)

FORECAST = "forecast"
"""Takes the place of the card in the file name of a forecast."""


_PACKAGES = ("torch", "transformers", "peft")


@cache
def packages() -> dict[str, str]:
    """Versions of the packages that a forecast depends on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def cell_sha256(cell: Cell, **more: Any) -> str:
    """Hash of a cell and of the measuring options in `more`."""
    asked = {"cell": cell.model_dump(mode="json"), **more}
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class Session(Protocol):
    """The record of a session that measures everything anew."""

    device: DeviceRecord
    provenance: Provenance

    def model_dump_json(self, *, indent: int) -> str:
        """Itself as text."""


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """What to measure of every cell."""

    device: DeviceKind
    warmup_steps: int
    timed_steps: int
    repeats: int

    def sha256(self, entry: Entry) -> str:
        """Hash of the cell together with these options."""
        return cell_sha256(
            entry.cell,
            device=self.device,
            warmup_steps=self.warmup_steps,
            timed_steps=self.timed_steps,
            repeats=self.repeats,
        )


def file_name(record: CellRecord | ForecastRecord) -> str:
    """File name of a record."""
    card = FORECAST if isinstance(record, ForecastRecord) else slug(record.device.name)
    return f"{record.cell.name}--{record.asked_sha256[:8]}--{card}--{record.code_sha256[:8]}.json"


def is_stale(record: CellRecord | ForecastRecord, cell: Cell) -> bool:
    """Whether a record of this cell is stale: made by other code than today's."""
    roots = step_forecast if isinstance(record, ForecastRecord) else measurement
    return record.code_sha256 != code_of(roots(cell.module)).sha256


class Store:
    """The records and forecasts of one study's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # ------------------------------------------------------------ measured

    def current(self, entry: Entry, asked: MeasureOptions, device: DeviceRecord | None = None) -> CellRecord | None:
        """The newest record of this cell with the same measuring options and today's code; None if there is none.

        A record with status `error` counts: the blocks measured before the program failed stay valid.

        Args:
            entry: the cell.
            asked: what to measure.
            device: records of other cards do not count; None accepts any card.
        """
        same = (
            record
            for record in self._of_cell(entry.named, CellRecord)
            if record.asked_sha256 == asked.sha256(entry)
            and not is_stale(record, entry.cell)
            and (device is None or device.name == record.device.name)
        )
        return max(same, key=_made, default=None)

    def measured(self, entry: Entry, kind: DeviceKind) -> list[CellRecord]:
        """Every record of exactly this cell on a kind of device, with any measuring options; the one to show is last.

        The one to show is by today's code, if there is one; then one that is complete; then the newest.
        """
        cell = entry.cell
        mine = [
            record
            for record in self._of_cell(entry.named, CellRecord)
            if record.device.kind == kind
            and (record.module, record.options, record.settings, record.shape, record.numerics, record.seed)
            == (cell.module, cell.options, cell.settings, cell.shape, cell.numerics, cell.seed)
            and record.cell_sha256 in (None, cell_sha256(cell))
        ]
        return sorted(mine, key=lambda record: (not is_stale(record, cell), _is_complete(record), _made(record)))

    def add(self, unit: Unit, reply: Reply, asked: MeasureOptions, device: DeviceRecord) -> CellRecord:
        """Add the result of a block to the cell's record."""
        entry = unit.entry
        record = _before_error(self.current(entry, asked, device) or self._fresh(entry, asked, device))
        changes: dict[str, object] = {}
        if reply.status != "ok":
            changes |= {"status": reply.status, "status_why": reply.why, "oom": reply.oom}
            changes |= {f"{unit.block}_why": f"{reply.status}: {reply.why}"}
            if unit.do == "memory":
                changes |= {"timing_why": f"{reply.status} in the memory block"}
        elif unit.do == "memory":
            changes |= {"memory": reply.memory, "memory_why": reply.why}
        else:
            timing = (*record.timing, reply.timing) if reply.timing is not None else record.timing
            changes |= {"timing": timing, "timing_why": reply.why}
        if reply.parameters is not None:
            changes |= {"parameters": reply.parameters, "trainable_parameters": reply.trainable_parameters}
            changes |= {"facts_why": None}
        record = self.predicted(entry, record.model_copy(update=changes))
        self.keep(record)
        return record

    def predict(self, entry: Entry, asked: MeasureOptions) -> None:
        """Add the forecast to a record that was written before the forecast was made."""
        record = self.current(entry, asked)
        if record is not None and record.predicted is None:
            self.keep(self.predicted(entry, record))

    def predicted(self, entry: Entry, record: CellRecord) -> CellRecord:
        """The record with the forecast beside the measured peak, if there is a forecast by today's code."""
        found = self.forecast(entry)
        if found is None or is_stale(found, entry.cell):
            return record.model_copy(update={"predicted": None, "predicted_why": "no forecast was made by this code"})
        if found.peak_bytes is None:
            return record.model_copy(update={"predicted": None, "predicted_why": found.status_why})
        measured = record.memory.allocated_peak_bytes if record.memory is not None else None
        return record.model_copy(
            update={
                "predicted": Predicted(
                    allocated_peak_bytes=found.peak_bytes,
                    relative_error=None if measured is None else (found.peak_bytes - measured) / measured,
                    relative_error_why=None if measured is not None else "no device memory was measured",
                ),
                "predicted_why": None,
            }
        )

    def _fresh(self, entry: Entry, asked: MeasureOptions, device: DeviceRecord) -> CellRecord:
        cell = entry.cell
        made_by = provenance(roots=measurement(cell.module), inputs={}, device=device.name)
        return CellRecord(
            cell=entry.named,
            status="ok",
            module=cell.module,
            options=cell.options,
            settings=cell.settings,
            shape=cell.shape,
            numerics=cell.numerics,
            seed=cell.seed,
            parameters=None,
            trainable_parameters=None,
            facts_why="no block of this cell ran to its end",
            device=device,
            cell_sha256=cell_sha256(cell),
            asked_sha256=asked.sha256(entry),
            code_sha256=made_by.source_sha256,
            provenance=made_by,
        )

    # ------------------------------------------------------------ forecast

    def forecast(self, entry: Entry) -> ForecastRecord | None:
        """The newest forecast of exactly this cell by today's code, else the newest of all; see `is_stale`."""
        mine = [r for r in self._of_cell(entry.named, ForecastRecord) if r.asked_sha256 == cell_sha256(entry.cell)]
        return max(mine, key=lambda record: (not is_stale(record, entry.cell), _made(record)), default=None)

    def has_fresh_forecast(self, entry: Entry) -> bool:
        """Whether today's code has forecast this cell, with the packages that are installed."""
        found = self.forecast(entry)
        return found is not None and not is_stale(found, entry.cell) and found.packages == packages()

    # ------------------------------------------------------------ files

    def records(self) -> Iterator[CellRecord]:
        """Every record of what was measured, whatever code made it.

        Raises:
            UserError: one cannot be read; it is named.
        """
        yield from self._read("*", CellRecord)

    def _of_cell(self, named: Named, kind: type[R]) -> Iterator[R]:
        """Records with these labels; the caller must compare hashes or options to know whether the cell is the same."""
        for record in self._read(f"{named.name}--*", kind):
            if record.cell == named:
                yield record

    def _read(self, pattern: str, kind: type[R]) -> Iterator[R]:
        for path in sorted((self.folder / "records").glob(f"{pattern}.json")):
            is_forecast = path.stem.split("--")[-2:-1] == [FORECAST]
            if is_forecast == (kind is ForecastRecord):
                yield read(path, kind)

    def keep(self, record: CellRecord | ForecastRecord) -> None:
        """Write a record to its file; a file of that name holds an earlier, less complete version of the record."""
        atomic.write_text(self.folder / "records" / file_name(record), record.model_dump_json(indent=2) + "\n")


def _made(record: CellRecord | ForecastRecord) -> str:
    """Start time of a record as sortable text; records without one come first."""
    return record.provenance.started_utc if isinstance(record, CellRecord) else record.started_utc or ""


def _is_complete(record: CellRecord) -> bool:
    """Whether a record has times, or says why there are none: one that a budget cut short hides no other."""
    return bool(record.timing) or record.status != "ok"


def _before_error(record: CellRecord) -> CellRecord:
    """The record without its error, if it has one, but with its blocks: the failed block is measured again."""
    if record.status != "error":
        return record
    missing = {f"{block}_why": None if getattr(record, block) else NOT_YET for block in get_args(Block)}
    return record.model_copy(update={"status": "ok", "status_why": None, **missing})


def write_session(record: Session, folder: Path) -> Path:
    """Write the record of a whole session in a file of its own, named by device and time; returns the path."""
    when = re.sub(r"[^0-9]", "", record.provenance.started_utc)[:14]
    path = folder / f"{slug(record.device.name)}--{when}.json"
    atomic.write_text(path, record.model_dump_json(indent=2) + "\n")
    return path


def slug(text: str) -> str:
    """A name of people, such as a card's, as one word of a file name."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def is_done(unit: Unit, record: CellRecord | None) -> bool:
    """Whether a block needs no measuring: it exists, or the cell cannot be measured. After an error it is retried."""
    if record is None:
        return False
    if record.status in ("oom", "skipped"):
        return True
    if unit.do == "memory":
        return record.memory is not None
    return any(block.repeat == unit.repeat for block in record.timing)
