"""An audit's observations as plain data; `harness.audit.observing` collects it, `harness.audit.judging` reads it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

Event = Literal[
    "on", "graded", "moved", "idle", "dragged", "moved_alone", "left_over", "set_by_hand", "written", "pending"
]
"""What can be seen of a tensor in a step: the counts of `Tensor`."""


FLAT = 1e-9
"""Relative change of a learning rate that counts as none."""


@dataclass
class Tensor:
    """One parameter of the model or of an adapter, over the whole audit. Counts are numbers of intervals."""

    part: str
    """`layer 3`, `embedding`, `final_norm` or `head`."""
    elements: int
    coarse: bool
    """16-bit and 1-D: entries near 1 may get gradients and never move."""
    on: int = 0
    """Intervals in which it required gradients when the forward pass that made the step's gradients began."""
    graded: int = 0
    """... and got one."""
    moved: int = 0
    """... and its bits changed inside an optimizer's step."""
    idle: int = 0
    """... and they did not, though its gradient was neither zero nor infinite and that step moved other tensors."""
    dragged: int = 0
    """Intervals in which it was off, and a step moved it that found a gradient left over from when it was on."""
    moved_alone: int = 0
    """... and a step moved it that found no such gradient."""
    left_over: int = 0
    """Intervals in which it was off when an optimizer stepped, with a gradient left over from when it was on."""
    set_by_hand: int = 0
    """... with a gradient that no backward pass made."""
    written: int = 0
    """Intervals in which its bits changed between steps."""
    pending: int = 0
    """Intervals in which it was on, in no watched optimizer, with a gradient that was neither zero nor infinite, while
    some step moved other tensors."""
    in_optimizer: bool = False
    """Whether a watched optimizer held it at any step."""
    other: str = ""
    """Another optimizer that stepped and holds it; empty if none was seen."""
    waiting: str = ""
    """Another optimizer that holds it and took no step; looked for only where a verdict depends on it."""

    @property
    def left_out(self) -> bool:
        """Whether only optimizers hold it that the audit was not given."""
        return bool(self.other) and not self.in_optimizer

    @property
    def unmoved(self) -> bool:
        """Whether nothing ever changed its bits, though they could have shown it."""
        return not self.moved and not self.written and not self.coarse

    @property
    def forgotten(self) -> bool:
        """Whether it got gradients for nothing: no optimizer that stepped holds it, and nothing moved it."""
        return self.pending > 0 and self.unmoved and not self.in_optimizer and not self.other


@dataclass(frozen=True)
class StateBytes:
    """Bytes of the optimizers' tensors after some step, each storage counted once."""

    step: int
    total: int
    sleeping: int
    """Of parameters that required no gradient then, on the same device as those parameters."""


@dataclass
class Group:
    """Learning rates of one parameter group, over all steps."""

    owner: int
    """Number of its optimizer among the watched ones."""
    optimizer: str
    """Its optimizer's class."""
    number: int
    first: float
    low: float
    high: float
    steps: int = 0
    scheduled: bool = False
    """Whether a scheduler of torch knows it."""
    parts: list[str] = field(default_factory=list)
    """Parts that it held at its last step."""

    def add(self, rate: float) -> None:
        """Note the rate of one step."""
        self.low, self.high = min(self.low, rate), max(self.high, rate)
        self.steps += 1

    @property
    def varies(self) -> bool:
        """Whether its rate changed."""
        return self.high - self.low > FLAT * max(self.high, FLAT)

    @property
    def stays_unasked(self) -> bool:
        """Whether it kept a rate above 0 though no scheduler of torch is known to want that."""
        return not self.varies and self.steps > 1 and self.high > 0 and not self.scheduled


@dataclass
class Facts:
    """All observations of an audit."""

    model: str
    optimizer: str
    """Names of the watched optimizers' classes."""
    layers: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    """A step is over when an optimizer is about to step again: with several, each steps at most once in it."""
    intervals: int = 0
    sets: list[frozenset[str]] = field(default_factory=list)
    """Parts that were on, a set an interval."""
    state: list[StateBytes] = field(default_factory=list)
    """After the first step of each interval."""
    groups: list[Group] = field(default_factory=list)
    reentrant: bool = False
    """Whether the model's checkpointing was of the kind that cuts backward off behind a frozen embedding."""

    def judged(self) -> list[Tensor]:
        """Tensors that verdicts are about: all but those of optimizers that the audit was not given."""
        return [tensor for tensor in self.tensors.values() if not tensor.left_out]

    def parts(self) -> list[str]:
        """Names of parts, bottom first."""
        return self.in_order({tensor.part for tensor in self.tensors.values()})

    def in_order(self, parts: Iterable[str]) -> list[str]:
        """These parts, each once, bottom first."""
        order = ["embedding", *(f"layer {i}" for i in range(self.layers)), "final_norm", "head"]
        return sorted(set(parts), key=order.index)

    def of(self, part: str) -> list[Tensor]:
        """Judged tensors of one part."""
        return [tensor for tensor in self.judged() if tensor.part == part]
