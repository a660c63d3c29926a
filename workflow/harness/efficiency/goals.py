"""The study's goals for a method, set before anything was measured. Imports no torch.

A goal is a ratio under equal settings, or a plain number. `parity` is as good as the method compared with; `best` is
near the bound that arithmetic gives. Whether less or more is better depends on the kind of goal.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from baselines.method import Strict
from harness.study.labels import Label

Level = Literal["parity", "good", "best"]


class _Goal(Strict):
    """What all goals have."""

    better: ClassVar[Literal["smaller", "larger"]] = "smaller"

    method: Label
    model: Label | None = Field(default=None, description="null: the anchor of a GPU")
    settings: Label
    shape: Label
    paper: float | None = Field(default=None, description="the paper's own figure")
    parity: float | None = None
    good: float | None = None
    best: float | None = None

    def reached(self, value: float | None) -> Level | Literal["none"] | None:
        """The highest level that `value` reaches: `none` if it reaches no level, None if the value is unknown."""
        if value is None:
            return None
        levels: tuple[tuple[Level, float | None], ...] = (
            ("best", self.best),
            ("good", self.good),
            ("parity", self.parity),
        )
        for name, goal in levels:
            if goal is not None and (value <= goal if self.better == "smaller" else value >= goal):
                return name
        return "none"


class MemoryRatio(_Goal):
    """Peak memory by that of another method."""

    kind: Literal["memory-ratio"]
    against: Label


class Peak(_Goal):
    """Peak memory in GiB."""

    kind: Literal["peak"]


class SpeedRatio(_Goal):
    """Tokens per second by those of another method."""

    better: ClassVar[Literal["smaller", "larger"]] = "larger"

    kind: Literal["speed-ratio"]
    against: Label


class Overhead(_Goal):
    """Share of the tokens per second that is lost against the same method with `resident` options."""

    kind: Literal["overhead"]


class ProbeShare(_Goal):
    """Time of one probing batch as a share of that of the steps between two."""

    kind: Literal["probe-share"]
    every_steps: int = Field(gt=0, description="steps to one probing batch")


class ProbePeak(_Goal):
    """GiB of probing beyond the peak of the other phases of a step."""

    kind: Literal["probe-peak"]


Goal = Annotated[MemoryRatio | Peak | SpeedRatio | Overhead | ProbeShare | ProbePeak, Field(discriminator="kind")]
