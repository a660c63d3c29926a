"""Records on disk: one file a cell and device, written whole after every block, read back only if still true."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from harness.efficiency.identity import cell_sha256, code_sha256, forecast_by, measured_by
from harness.efficiency.jobs import Reply
from harness.efficiency.plan import Entry, Unit
from harness.efficiency.record import CellRecord, ForecastRecord, Predicted
from harness.records import atomic
from harness.records.device import DeviceKind, DeviceRecord
from harness.records.provenance import provenance


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is measured of every cell."""

    device: DeviceKind
    warmup_steps: int
    timed_steps: int
    repeats: int

    def sha256(self, entry: Entry) -> str:
        """Hash of the cell and of this."""
        return cell_sha256(
            entry.cell,
            device=self.device,
            warmup_steps=self.warmup_steps,
            timed_steps=self.timed_steps,
            repeats=self.repeats,
        )


class Store:
    """The records and forecasts of one results folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    # ------------------------------------------------------------ measured

    def path(self, entry: Entry, device: DeviceKind) -> Path:
        """Where a cell's record lies."""
        return self.folder / "records" / device / f"{entry.named.name}.json"

    def current(self, entry: Entry, asked: Asked, device: DeviceRecord | None = None) -> CellRecord | None:
        """The cell's record, if it answers the same question by the same code; else None.

        Args:
            entry: the cell.
            asked: what is measured.
            device: a record of another card counts as none; None: any card.
        """
        record = read_record(self.path(entry, asked.device))
        if record is None or record.status == "error":
            return None
        same = (
            record.asked_sha256 == asked.sha256(entry)
            and record.code_sha256 == code_sha256(measured_by(entry.cell))
            and (device is None or device.name == record.device.name)
        )
        return record if same else None

    def add(self, unit: Unit, reply: Reply, asked: Asked, device: DeviceRecord) -> CellRecord:
        """Put what came of a block into the cell's record."""
        entry = unit.entry
        record = self.current(entry, asked, device) or self._fresh(entry, asked, device)
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
        self._write(self.path(entry, asked.device), record)
        return record

    def predict(self, entry: Entry, asked: Asked) -> None:
        """Put the forecast into a record that was written before there was one."""
        record = self.current(entry, asked)
        if record is not None and record.predicted is None:
            self._write(self.path(entry, asked.device), self.predicted(entry, record))

    def predicted(self, entry: Entry, record: CellRecord) -> CellRecord:
        """The record with the forecast beside what was measured, if there is a forecast by today's code."""
        found = self.forecast(entry)
        if found is None:
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

    def _fresh(self, entry: Entry, asked: Asked, device: DeviceRecord) -> CellRecord:
        cell = entry.cell
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
            asked_sha256=asked.sha256(entry),
            code_sha256=code_sha256(measured_by(cell)),
            provenance=provenance(sources=measured_by(cell), inputs={}, device=device.name),
        )

    def _write(self, path: Path, record: CellRecord | ForecastRecord) -> None:
        atomic.write_text(path, record.model_dump_json(indent=2) + "\n")

    # ------------------------------------------------------------ forecast

    def forecast_path(self, entry: Entry) -> Path:
        """Where a cell's forecast lies."""
        return self.folder / "forecasts" / f"{entry.named.name}.json"

    def forecast(self, entry: Entry) -> ForecastRecord | None:
        """The cell's forecast, if it is one of this cell by today's code."""
        path = self.forecast_path(entry)
        if not path.is_file():
            return None
        try:
            record = ForecastRecord.model_validate_json(path.read_bytes())
        except ValidationError:
            return None
        same = record.asked_sha256 == cell_sha256(entry.cell) and record.code_sha256 == code_sha256(
            forecast_by(entry.cell)
        )
        return record if same else None

    def add_forecast(self, entry: Entry, record: ForecastRecord) -> None:
        """Keep a forecast."""
        self._write(self.forecast_path(entry), record)

    # ------------------------------------------------------------ all

    def records(self) -> Iterator[CellRecord]:
        """Every readable record, whatever made it."""
        for path in sorted((self.folder / "records").glob("*/*.json")):
            record = read_record(path)
            if record is not None:
                yield record


def read_record(path: Path) -> CellRecord | None:
    """A record of today's shape; None where there is none, or one of another time."""
    if not path.is_file():
        return None
    try:
        return CellRecord.model_validate_json(path.read_bytes())
    except ValidationError:
        return None


def is_done(unit: Unit, record: CellRecord | None) -> bool:
    """Whether this block needs no measuring: it is there, or the cell cannot be measured."""
    if record is None:
        return False
    if record.status != "ok":
        return True
    if unit.do == "memory":
        return record.memory is not None
    return any(block.repeat == unit.repeat for block in record.timing)
