"""Which method, on this model and this card: forecasts of all of them, bounds on their speed, and code for the best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from harness.forecasting.forecast import Forecast, NoForecastError, forecast
from harness.records.units import GIB
from harness.step.cell import configuration
from harness.step.flops import StepCost, attention_width, step_cost
from harness.step.outcomes import CannotRunError
from harness.step.spec import Cell

CONTEXT_BYTES = round(0.6 * GIB)
"""Device memory of a process beyond its tensors: the CUDA context of an H100 takes 0.4 to 0.6 GiB."""
OVERHEAD_FACTOR = 1.04
"""Factor for fragmentation and buffers inside kernels: an allocator's peak is 1 to 4 % above the live storages."""


def needed_bytes(forecast: Forecast) -> int:
    """Memory in bytes that a card must have for the forecast step."""
    return round(forecast.peak_bytes * OVERHEAD_FACTOR) + CONTEXT_BYTES


@dataclass(frozen=True)
class Choice:
    """One method under one setting."""

    method: str
    settings: str
    cell: Cell
    forecast: Forecast | None
    reason: str | None
    """Why there is no forecast."""
    cost: StepCost | None

    @property
    def needed_bytes(self) -> int | None:
        """Memory that the card must have."""
        return None if self.forecast is None else needed_bytes(self.forecast)

    def fits(self, vram_bytes: int) -> bool:
        """Whether it runs on a card of this size."""
        return self.needed_bytes is not None and self.needed_bytes <= vram_bytes


def choices(cells: Iterable[tuple[str, str, Cell]], *, vram_bytes: int) -> Iterator[Choice]:
    """Forecast every (method, settings, cell) on a card of this size, one by one; each takes seconds."""
    for method, settings, cell in cells:
        try:
            found = forecast(cell, capacity_bytes=vram_bytes)
        except (CannotRunError, NoForecastError) as error:
            yield Choice(method, settings, cell, None, str(error), None)
            continue
        yield Choice(method, settings, cell, found, None, _cost(cell, found))


def best(found: list[Choice], *, vram_bytes: int) -> Choice | None:
    """The choice that fits and has the highest bound on speed; among equals the one with the lowest peak."""
    fitting = [choice for choice in found if choice.fits(vram_bytes)]
    return max(fitting, key=_sort_key, default=None)


def _sort_key(choice: Choice) -> tuple[float, int]:
    assert choice.cost is not None
    assert choice.forecast is not None
    return round(choice.cost.tokens_per_s, 3), -choice.forecast.peak_bytes


def _cost(cell: Cell, found: Forecast) -> StepCost:
    width = attention_width(configuration(cell.model))
    return step_cost(found.facts, found.promise, cell.settings, cell.shape, attention_width=width)
