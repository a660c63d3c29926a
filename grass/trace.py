"""What happened in every step: `Record`, `History` (the type of `opt.history`), and its JSON Lines file.

When a step ends, the host has all of a record's values but two: the gradient norms are still on the device, and only
device events know how long computation waited for copies. Reading either would make the host wait for the device in
every step, so a history stores them unread and reads them on access.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from grass.host import current

MOST_PENDING = 256
"""Most records with unread device values; at this number all of them are read, in one transfer."""


@dataclass(frozen=True)
class Record:
    """One optimizer step. Tuples over layers have one entry per decoder layer, bottom first."""

    step: int
    """Number of the step, counted from 0."""
    active: tuple[int, ...]
    """Decoder layers that trained in this step, ascending (paper: the gamma sampled layers); empty while probing."""
    norm: tuple[float | None, ...]
    """r, root mean square of each layer's gradient entries before clipping, in units of loss per unit of weight (paper:
    gradient norm of one step); None if it was not measured, as in a sleeping layer."""
    importance: tuple[float | None, ...] | None
    """m, the mean gradient norms used in this step, in the unit of r (paper: mean gradient norm, its measure of layer
    importance); None before probing and with a sampler that measures nothing; an entry is None if the user froze the
    layer."""
    age: tuple[int, ...] | None
    """Steps since each entry of `importance` was measured; None if `importance` is None (ours)."""
    probability: tuple[float, ...]
    """P, the sampling probabilities used in this step; they sum to 1 (paper: softmax of m over tau)."""
    effective_layers: float
    """exp(H(P)), a number of layers, from 1 (one layer has all the probability) to all layers (uniform) (ours)."""
    mode: str
    """How optimizer states were kept in this step: `resident` on the device, or `move` to and from the host (paper:
    layer-wise optimizer state offloading)."""
    moved_bytes: int
    """Bytes of optimizer state copied between device and host on behalf of this step, both directions together."""
    exposed_copy_s: float | None
    """Seconds that computation waited for those copies (paper: the time that overlapping computation and communication
    does not hide); None if unknown."""
    temperature: float | None = None
    """Tau, the temperature in use in this step, infinite if draws are uniform (paper; solved for with
    `temperature="auto"`, ours); None before probing, with a sampler that uses none, and in files of version 0.1."""


@dataclass(frozen=True)
class _Pending:
    """Values of one record that are still to be read."""

    norms: Tensor | None
    exposed: Callable[[], float | None] | None
    layers: Sequence[int]
    """Of which layers `norms` are."""
    measured: Sequence[int]
    """Those of them that were measured."""


class History(Sequence[Record]):
    """Records in the order of their steps; read like a list, equal to a list of the same records.

    `append`, `len` and `repr` never read device memory, except `append` at `MOST_PENDING`. An index, a slice, iteration
    and a comparison do if a record they touch is pending; then all pending records are read together.
    """

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._pending: dict[int, _Pending] = {}

    def append(
        self,
        record: Record,
        norms: Tensor | None = None,
        exposed: Callable[[], float | None] | None = None,
        *,
        layers: Sequence[int] | None = None,
    ) -> None:
        """Add the next step, without waiting for the device unless `MOST_PENDING` records are pending.

        A tensor without values (a fake or a meta tensor, as in a memory forecast) is dropped together with `exposed`:
        that step was never computed, so both stay None in its record.

        Args:
            record: the step; with `norms`, its `norm` is all None; with `exposed`, its `exposed_copy_s` is None.
            norms: r of the layers in `record.active`, or of all layers if that is empty; shape (layers,), fp32, on any
                device. It is kept, not copied: do not write into it afterwards.
            exposed: gives `exposed_copy_s`; called once, at any time from now on, and may wait for the device.
            layers: which of these were measured; the norms of others are not entered.

        Raises:
            ValueError: `norms` does not have one value for each of those layers.
        """
        of = record.active or range(len(record.norm))
        if norms is not None:
            expected = len(of)
            if norms.shape != (expected,):
                raise ValueError(
                    f"norms of step {record.step} must have shape ({expected},), one value for each measured layer, "
                    f"not {tuple(norms.shape)}"
                )
            if not current().has_values(norms):
                norms = exposed = None
        if norms is not None or exposed is not None:
            held = None if norms is None else norms.detach()
            self._pending[len(self._records)] = _Pending(held, exposed, of, of if layers is None else layers)
        self._records.append(record)
        if len(self._pending) >= MOST_PENDING:
            self._read_pending()

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        touched = range(len(self))[index if isinstance(index, slice) else slice(index, index + 1 or None)]
        if not self._pending.keys().isdisjoint(touched):
            self._read_pending()
        return self._records[index]

    def __iter__(self) -> Iterator[Record]:
        return iter(self[:])

    def __eq__(self, other: object) -> bool:
        if isinstance(other, History | list):
            return self[:] == other[:]
        return NotImplemented

    __hash__ = None  # type: ignore[assignment]  # it grows

    def __repr__(self) -> str:
        return f"History({len(self)} steps)"

    def _read_pending(self) -> None:
        """Fill in every pending record: one transfer for all norms, then the copy times."""
        rows = iter(_to_host([p.norms for p in self._pending.values() if p.norms is not None]))
        found: dict[int, Record] = {}
        for i, pending in self._pending.items():
            record = self._records[i]
            if pending.norms is not None:
                r = dict(zip(pending.layers, next(rows), strict=True))
                norm = tuple(r[n] if n in pending.measured else None for n in range(len(record.norm)))
                record = replace(record, norm=norm)
            if pending.exposed is not None:
                record = replace(record, exposed_copy_s=pending.exposed())
            found[i] = record
        for i, record in found.items():
            self._records[i] = record
        self._pending.clear()


def write_history(history: Sequence[Record], path: str | Path) -> None:
    """Write one JSON object per line, with the fields of `Record` as keys, and replace `path` atomically.

    Every line is strict JSON. Numbers that JSON lacks are the strings "NaN", "Infinity" and "-Infinity", as in Protocol
    Buffers' JSON: a norm that overflowed must stay visible, and null means not measured.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            for record in history:
                row = {field.name: _encode(getattr(record, field.name)) for field in fields(Record)}
                file.write(json.dumps(row, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_history(path: str | Path) -> list[Record]:
    """Inverse of `write_history`.

    Raises:
        ValueError: a line that is not a record; the message names the file, the line and what is wrong.
    """
    records = []
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                records.append(_decode(line.decode("utf-8")))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    return records


def _to_host(tensors: list[Tensor]) -> list[list[float]]:
    """Values of 1-d tensors, with one transfer per device (usually there is one device)."""
    values = {
        device: iter(current().numbers(torch.cat([t for t in tensors if t.device == device])))
        for device in {t.device for t in tensors}
    }
    return [list(islice(values[t.device], len(t))) for t in tensors]


def _encode(value: Any) -> Any:
    """A field's value in strict JSON."""
    if isinstance(value, tuple):
        return [v if v is None or math.isfinite(v) else _word(v) for v in value]
    return _word(value) if isinstance(value, float) and not math.isfinite(value) else value


def _word(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _decode(line: str) -> Record:
    try:
        row = json.loads(line, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise ValueError("a record is a JSON object with one key a field")
    names = [field.name for field in fields(Record)]
    needed = {field.name for field in fields(Record) if field.default is MISSING}
    for wrong, which in (("missing", needed - set(row)), ("unknown", set(row) - set(names))):
        if which:
            raise ValueError(f"{wrong} field {', '.join(sorted(which))}")
    values = {}
    for name in names:
        try:
            if name in row:
                values[name] = _FIELDS[name](row[name])
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{name}: {error}") from error
    record = Record(**values)
    count = len(record.probability)
    for name in ("norm", "importance", "age"):
        entries = getattr(record, name)
        if entries is not None and len(entries) != count:
            raise ValueError(f"{name} has {len(entries)} entries, but probability has {count}: one a layer is needed")
    if any(layer not in range(count) for layer in record.active):
        raise ValueError(f"active names a layer that is not from 0 to {count - 1}: {list(record.active)}")
    return record


def _refuse(constant: str) -> float:
    raise ValueError(f'{constant} is not JSON; write it as the string "{constant}"')


def _integer(value: Any) -> int:
    # bool is an int in Python, but true and false in the file are not numbers
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{json.dumps(value)} is not a whole number")
    return value


def _number(value: Any) -> float:
    if isinstance(value, float) or (isinstance(value, str) and value in ("NaN", "Infinity", "-Infinity")):
        return float(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{json.dumps(value)} is not a number")
    return float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{json.dumps(value)} is not a string")
    return value


def _tuple_of(entry: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError(f"{json.dumps(value)} is not a list")
        return tuple(entry(v) for v in value)

    return read


def _or_none(entry: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else entry(value)


_FIELDS: dict[str, Callable[[Any], Any]] = {
    "step": _integer,
    "active": _tuple_of(_integer),
    "norm": _tuple_of(_or_none(_number)),
    "importance": _or_none(_tuple_of(_or_none(_number))),
    "age": _or_none(_tuple_of(_integer)),
    "probability": _tuple_of(_number),
    "effective_layers": _number,
    "mode": _text,
    "moved_bytes": _integer,
    "exposed_copy_s": _or_none(_number),
    "temperature": _or_none(_number),
}
"""How each field of `Record` is read from parsed JSON."""
