"""Energy of the GPU by the driver's own counter. Imports no torch.

The counter is of the whole card: idle power is in it, and whatever else runs there. So a card of which this process has
a part only, or that it shared, gives no figure; and none is made up from power and time. What counts a span's energy
must see to it that the device has done what came before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from harness.measuring.card import Card

SHORTEST_S = 2.0
"""Seconds below which a span has no energy. Ours: the counter moves every 20 to 100 ms (manual page of
PetscLogGpuEnergyMeter), so that a span of this length is known to 5 %."""

COUNTS = (
    "Joules: NVML's counter, of the whole card, idle power included; what the host uses is not in it, and a card that "
    "was shared or partitioned has no figure."
)
"""What tables say beside every figure of energy."""
OLDER = "the record is older than the measurement of energy"


@dataclass(frozen=True)
class Joules:
    """Energy of a span."""

    j: float | None
    """None where it is not known."""
    why: str | None = None
    """Why it is not known."""

    def over(self, seconds: float) -> Joules:
        """The same, or unknown with the reason if the span is too short for the counter, or the counter stood still."""
        if self.j is None:
            return self
        if seconds < SHORTEST_S:
            return Joules(None, f"{seconds:.2f} s were measured, and the card's energy counter needs {SHORTEST_S:g} s")
        return self if self.j > 0 else Joules(None, f"the card's energy counter stood still for {seconds:.2f} s")


def together(parts: Sequence[Joules]) -> Joules:
    """Sum of several spans or cards, at least one; unknown if one of them is, with the first reason."""
    known = [part.j for part in parts if part.j is not None]
    if len(known) < len(parts):
        return next(part for part in parts if part.j is None)
    return Joules(sum(known))


class EnergyMeter:
    """Reads a card's counter at both ends of a span.

    Args:
        card: the card; None where there is none.
        why: why nothing can be read, if that is known.
    """

    def __init__(self, card: Card | None, why: str | None) -> None:
        self._card, self._why = card, why
        if card is not None:
            self._why = card.part_why or why
        self._began_mj = 0

    def start(self) -> None:
        """Begin a span."""
        self._began_mj = self._read() or 0

    def stop(self) -> Joules:
        """End the span that began last."""
        now = self._read()
        if now is None:
            return Joules(None, self._why)
        if now < self._began_mj:
            return Joules(None, "the card's energy counter went back, as when the driver is loaded anew")
        return Joules((now - self._began_mj) / 1000)

    def _read(self) -> int | None:
        """The counter in millijoules; what fails once is not asked again, since a span needs both of its ends."""
        if self._card is None or self._why is not None:
            return None
        try:
            return self._card.energy_mj()
        except Exception as error:  # noqa: BLE001  NVML's errors share no base, and none may stop a run
            self._why = f"the card's energy counter cannot be read (NVML: {error})"
            return None
