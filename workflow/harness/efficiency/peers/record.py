"""What was measured of our methods and other people's code for them. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from harness.efficiency.by_turns import Spread
from harness.records.device import DeviceRecord, StrictRecord
from harness.records.record import Provenance
from harness.step.spec import Geometry, Shape


class Side(StrictRecord):
    """One training loop."""

    step_s: Spread | None = Field(description="wall time of a whole step, of rounds that nothing disturbed")
    tokens_per_s: float | None = Field(description="by the median step; null where no round was undisturbed")
    update_s: Spread | None = Field(
        description="clipping, the optimizer's step, dropping gradients; null: they are in backward"
    )
    peak_bytes: int | None = Field(
        description="from before the model was built to its highest; resident memory of a process of its own, on CUDA "
        "what the allocator gave; null where the kernel does not say"
    )
    state_bytes: int = Field(description="alive between two steps after the last one, without weights")
    loss: float | None = Field(
        description="of one more batch after the last step, in nats per token; null if not finite"
    )


class PeerRow(StrictRecord):
    """Ours and one peer."""

    ours: str
    peer: str
    package: str | None = Field(description="<distribution>==<version>")
    note: str = Field(description="what the peer lacks, or does otherwise")
    missing_why: str | None = Field(default=None, description="why there are no numbers")
    our_side: Side | None = None
    peer_side: Side | None = None
    speed_ratio: Spread | None = Field(
        default=None, description="tokens/s of ours to the peer's: round by round, by processor time (CUDA: events)"
    )
    speed_half_width: float | None = Field(default=None, description="of the 95 % interval of its median, as a share")
    steady: bool | None = Field(default=None, description="whether that is below the bound; false: it was not reached")
    update_ratio: float | None = Field(default=None, description="of the medians of update_s")
    rounds: int | None = None
    disturbed_rounds: int | None = Field(default=None, description="left out: other work held the processors")
    disturbed_why: str | None = None

    @property
    def peak_ratio(self) -> float | None:
        """Peak bytes, ours to the peer's."""
        return _ratio(self, "peak_bytes")

    @property
    def state_ratio(self) -> float | None:
        """State bytes, ours to the peer's; None where the peer keeps none."""
        return _ratio(self, "state_bytes")


def _ratio(row: PeerRow, name: str) -> float | None:
    mine, theirs = (getattr(side, name, None) for side in (row.our_side, row.peer_side))
    return mine / theirs if mine is not None and theirs else None


class PeersRecord(StrictRecord):
    """One session."""

    device: DeviceRecord
    geometry: Geometry
    shape: Shape
    period_steps: int
    steps_before_loss: int
    least_rounds: int
    most_rounds: int
    bound: float
    rows: tuple[PeerRow, ...]
    spent_s: float
    provenance: Provenance
