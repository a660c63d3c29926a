"""Claims of a paper as typed records: what is claimed, where, what would decide it, and how much that takes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from scipy import special

from baselines.method import Strict
from harness.reporting.stats import ALPHA, POWER
from harness.study.labels import Label
from harness.study.strict_yaml import read_yaml, validate

Match = Literal["exact", "proxy", "unknown"]
"""Whether our protocol is the paper's; only an exact one can contradict the paper."""
Tier = Literal["paper", "abstract", "secondary", "calculated"]
MOST_SEEDS = 1000
"""Where the search for a number of seeds ends."""


class _Claim(Strict):
    says: str = Field(description="the claim in one sentence")
    table: str = Field(description="table, figure or section of the paper")
    source: str = Field(description="letters of `sources`")
    tier: Tier
    protocol_match: Match
    note: str = ""


class Comparison(_Claim):
    """One method is more accurate than another, or not less, by model."""

    kind: Literal["difference"]
    task: Label
    suites: tuple[Label, ...] = Field(min_length=1, description="the plain mean over them")
    method: Label
    against: Label
    points: dict[Label, float] = Field(min_length=1, description="the paper's difference, by model")
    expects: Literal["above", "below", "at least"]
    margin: float = Field(ge=0, description="points; stated before anything was measured")

    @property
    def bar(self) -> float:
        """Points that the difference has to lie above, or below."""
        return self.margin if self.expects == "above" else -self.margin


class Order(_Claim):
    """Methods in ascending order of peak memory."""

    kind: Literal["order"]
    task: Label
    model: Label
    methods: tuple[Label, ...] = Field(min_length=2)
    gigabytes: tuple[float, ...] = Field(description="the paper's, in the same order")
    margin: float = Field(ge=0, description="share of the larger one that two must differ by to be ordered")


class Spread(_Claim):
    """The standard deviation over seeds is no larger than stated."""

    kind: Literal["spread"]
    task: Label
    suites: tuple[Label, ...] = Field(min_length=1)
    method: Label
    points: dict[Label, float] = Field(min_length=1, description="the paper's standard deviation, by model")
    ratio: float = Field(gt=1, description="times the paper's that still counts as the same")
    seeds: int = Field(ge=3, description="that a verdict needs")


class Elsewhere(_Claim):
    """What another study of this project decides."""

    kind: Literal["elsewhere"]
    value: float | None = None
    unit: str = ""
    study: str = Field(description="file under config/")
    decides: str = Field(description="what is measured there, and what would decide")


Claim = Annotated[Comparison | Order | Spread | Elsewhere, Field(discriminator="kind")]


class Claims(Strict):
    """A file of claims."""

    title: str
    protocol: str = Field(description="why `protocol_match` is what it is; said once on the page")
    sources: dict[str, str]
    seed_sd: float = Field(gt=0, description="points between seeds that the numbers of seeds needed assume")
    disagreement: float = Field(gt=0, le=1, description="share of items on which two runs differ, assumed likewise")
    claims: dict[Label, Claim] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Claims:
        for label, claim in self.claims.items():
            if unknown := set(claim.source) - self.sources.keys():
                raise ValueError(f"claims.{label}.source: unknown source {', '.join(sorted(unknown))}")
            if isinstance(claim, Order) and len(claim.gigabytes) != len(claim.methods):
                raise ValueError(f"claims.{label}.gigabytes: one number a method, in the same order")
        return self


def load_claims(path: Path) -> Claims:
    """Read a file of claims.

    Raises:
        ConfigError: one line that names file, line and key.
    """
    source = read_yaml(path)
    loaded: Claims = validate(Claims, source.value, source)
    return loaded


def seeds_needed(points: float, seed_sd: float) -> int | None:
    """Seeds a method for 80 % power of a two-sided paired t test at 5 %; None above `MOST_SEEDS`.

    Args:
        points: true difference.
        seed_sd: standard deviation of one run over seeds, the same for both methods and independent.
    """
    if points == 0:
        return None
    from scipy.stats import nct  # half a second, which studies without claims need not spend

    for n in range(2, MOST_SEEDS + 1):
        away = abs(points) / (math.sqrt(2) * seed_sd) * math.sqrt(n)
        critical = float(special.stdtrit(n - 1, 1 - ALPHA / 2))
        if float(nct.sf(critical, n - 1, away)) >= POWER:
            return n
    return None


def items_needed(points: float, disagreement: float) -> int | None:
    """Test items for 80 % power of a two-sided paired test of two runs at 5 %.

    Args:
        points: true difference of accuracy, percentage points.
        disagreement: share of items that one run has right and the other wrong.
    """
    if points == 0:
        return None
    reach = float(special.ndtri(1 - ALPHA / 2) + special.ndtri(POWER))
    share = abs(points) / 100
    return math.ceil(reach**2 * max(disagreement - share**2, share - share**2) / share**2)
