"""An audit's observations as plain data; `harness.audit.observing` collects it, `harness.audit.judging` reads it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Tensor:
    """One parameter of the model or of an adapter, over the whole audit. Counts are numbers of intervals."""

    part: str
    """`layer 3`, `embedding`, `final_norm` or `head`."""
    elements: int
    coarse: bool
    """16-bit and 1-D: entries near 1 may get gradients and never move."""
    on: int = 0
    """Intervals in which it required gradients."""
    graded: int = 0
    """... and had one when the interval's first step came."""
    moved: int = 0
    """... and its bits changed, at a rate above 0."""
    on_with_rate: int = 0
    """Intervals in which it was on, had a gradient that was not all zero, and some rate was above 0."""
    moved_off: int = 0
    """Intervals in which it did not require gradients and its bits changed all the same."""
    stale_gradients: int = 0
    """Intervals in which it did not require gradients and had one all the same."""
    in_optimizer: bool = False
    """Whether any parameter group held it at any step."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes of the optimizer's tensors after some step."""

    step: int
    total: int
    sleeping: int
    """Of parameters that required no gradient then, on the same device as those parameters."""


@dataclass
class Facts:
    """All observations of an audit."""

    model: str
    optimizer: str
    layers: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    intervals: int = 0
    sets: list[frozenset[str]] = field(default_factory=list)
    """Parts that were on, a set an interval."""
    state: list[StateBytes] = field(default_factory=list)
    rates: list[list[float]] = field(default_factory=list)
    """Learning rate of each parameter group, at each step."""
    group_parts: list[list[str]] = field(default_factory=list)
    """Parts that each parameter group held at the last step."""

    def parts(self) -> list[str]:
        """Names of parts, bottom first."""
        order = ["embedding", *(f"layer {i}" for i in range(self.layers)), "final_norm", "head"]
        known = {tensor.part for tensor in self.tensors.values()}
        return [part for part in order if part in known]

    def of(self, part: str) -> list[Tensor]:
        """Tensors of one part."""
        return [tensor for tensor in self.tensors.values() if tensor.part == part]
