"""Which method, on this model and this card: a forecast of each under every setting, and which is to be taken.

Forecasts are kept in a folder of their own and known by content: the same configuration under another path, or asked
for another card, is not forecast again until the code or a package changes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.efficiency.budget import Budget
from harness.efficiency.forecasts import fill_forecasts
from harness.efficiency.plan import Entry
from harness.efficiency.record import ForecastRecord, Named
from harness.efficiency.spec import EfficiencyStudy, cell_with, model_of
from harness.efficiency.store import Store, slug
from harness.forecasting.needed import needed_bytes
from harness.records import atomic
from harness.step.spec import Cell, Geometry, Shape


@dataclass(frozen=True)
class Option:
    """A method under one setting."""

    method: str
    settings: str
    cell: Cell
    record: ForecastRecord | None
    why: str | None
    """Why there is no forecast."""

    @property
    def needed_bytes(self) -> int | None:
        """Memory that the card must have; None without a forecast."""
        peak = None if self.record is None else self.record.peak_bytes
        return None if peak is None else needed_bytes(peak)

    @property
    def tokens_per_s(self) -> float:
        """Arithmetic's bound; 0 without a forecast."""
        return (self.record.bound_tokens_per_s or 0.0) if self.record is not None else 0.0

    def fits(self, vram_bytes: int) -> bool:
        """Whether it runs on a card of this size."""
        return self.needed_bytes is not None and self.needed_bytes <= vram_bytes


@dataclass(frozen=True)
class Advice:
    """Every method of a study on one model and one card."""

    vram_bytes: int
    options: tuple[Option, ...]

    @property
    def fitting(self) -> list[Option]:
        """Of each method that fits the fastest setting; the fastest method first, of equal ones the smaller."""
        found: dict[str, Option] = {}
        for option in sorted(self.options, key=_fastest_first):
            if option.fits(self.vram_bytes):
                found.setdefault(option.method, option)
        return list(found.values())

    @property
    def too_large(self) -> list[Option]:
        """Of each method that fits under no setting the smallest one; the smallest method first."""
        fits = {option.method for option in self.fitting}
        found: dict[str, Option] = {}
        for option in sorted(self.options, key=lambda option: option.needed_bytes or 0):
            if option.needed_bytes is not None and option.method not in fits:
                found.setdefault(option.method, option)
        return list(found.values())

    def of(self, method: str, settings: str) -> Option:
        """One of the options."""
        return next(o for o in self.options if (o.method, o.settings) == (method, settings))

    @property
    def reasons(self) -> dict[str, list[Option]]:
        """What has no forecast, by the reason."""
        found: dict[str, list[Option]] = {}
        for option in self.options:
            if option.why is not None:
                found.setdefault(option.why, []).append(option)
        return found


def _fastest_first(option: Option) -> tuple[float, int]:
    return -round(option.tokens_per_s, 3), option.needed_bytes or 0


def advise(
    study: EfficiencyStudy,
    *,
    model: str,
    shape: Shape,
    vram_bytes: int,
    folder: Path,
    cores: int,
    told: Callable[[int], Callable[[str], None]],
) -> Advice:
    """Forecast every method of the study that `folder` has no forecast of.

    Args:
        study: methods, settings and numerics.
        model: of the study, a folder with a config.json, or a repository of the hub (`spec.model_of`).
        shape: of the micro-batch.
        vram_bytes: memory of the card.
        folder: where forecasts are kept.
        cores: number of processes.
        told: is given the number of forecasts to make; what it returns is given a line for each that is made.

    Raises:
        UserError: there is no such model.
    """
    found, label = _kept_model(model_of(study, model), model, folder)
    store = Store(folder)
    entries = _entries(study, found, label, shape, vram_bytes)
    waiting = [entry for entry in entries if not store.has_fresh_forecast(entry)]
    # recomputation takes time: what takes longest begins first, so that no process ends alone
    waiting.sort(key=lambda entry: not entry.cell.settings.activation_checkpointing)
    failed = fill_forecasts(waiting, store, Budget(None), cores=cores, told=told(len(waiting))) if waiting else []
    return Advice(vram_bytes, tuple(_option(entry, store, failed) for entry in entries))


def _kept_model(found: Geometry | Path, name: str, folder: Path) -> tuple[Geometry | Path, str]:
    """The model as cells name it, and its label. A configuration is copied to a folder that is named by its content."""
    if isinstance(found, Geometry):
        return found, name
    config = found / "config.json"
    kept = folder / "models" / atomic.sha256(config)[:12]
    if not (kept / config.name).is_file():
        with atomic.whole_file(kept / config.name) as temporary:
            shutil.copyfile(config, temporary)
    return kept, f"{slug(found.resolve().name)}-{kept.name}"


def _entries(study: EfficiencyStudy, model: Geometry | Path, label: str, shape: Shape, vram_bytes: int) -> list[Entry]:
    entries = []
    for settings in study.settings:
        for method in study.methods:
            cell = cell_with(study, model=model, method=method, settings=settings, shape=shape)
            if cell.options.get("offload") == "auto":
                cell = cell.model_copy(update={"capacity_bytes": vram_bytes})
            named = Named(model=label, settings=settings, shape=f"{shape.batch}x{shape.length}", method=method)
            entries.append(Entry(named, cell))
    return entries


def _option(entry: Entry, store: Store, failed: Sequence[str]) -> Option:
    """What came of a cell; a forecast that failed just now hides none that older code has made."""
    fault = next((line for line in failed if line.startswith(f"{entry.words}: ")), None)
    record = store.forecast(entry) if fault is None else None
    why = None if record is None else record.status_why
    if fault is not None:
        why = f"a fault of the project, please report it: {fault.removeprefix(f'{entry.words}: ')}"
    return Option(entry.named.method, entry.named.settings, entry.cell, record, why)
