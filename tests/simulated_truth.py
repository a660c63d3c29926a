"""What intervals and verdicts do on made-up studies whose truth is known: `python -m tests.simulated_truth`.

A study is one method and several rivals, each run with a few seeds on the same test items. An item is right with a
chance that depends on the item, on the run (the noise between seeds) and on the method. The truth is the difference
over all seeds and items that could have been drawn. Counted over many studies: how often each interval covers the
truth, how often a study of equal methods claims any difference, and how often a true difference is claimed.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "workflow"), str(ROOT)]

from harness.records.atomic import write_text  # noqa: E402
from harness.reporting.published_claims import seeds_needed  # noqa: E402
from harness.reporting.stats import Difference, Pairs, detectable, judge, paired_difference  # noqa: E402

Array = NDArray[np.float64]
ITEM_SPREAD = 1.5
"""Standard deviation of the items' difficulty, on the logit scale."""
LEVEL = -0.5
"""Logit of a middling item."""


@dataclass(frozen=True)
class World:
    """How studies are drawn."""

    seeds: int
    items: int
    rivals: int
    seed_spread: float
    """Standard deviation between runs of one method, logit scale."""
    idiosyncrasy: float
    """Standard deviation of a run's own ease with an item, logit scale."""
    effect: float = 0.0
    """How much better the method is than every rival, logit scale."""

    def truth(self) -> float:
        """Difference of accuracy over all seeds and items."""
        spread = math.sqrt(ITEM_SPREAD**2 + self.seed_spread**2 + self.idiosyncrasy**2)
        nodes, weights = np.polynomial.hermite_e.hermegauss(101)
        return float(
            sum(
                sign * (weights / weights.sum() * scipy_stats.logistic.cdf(LEVEL + effect + spread * nodes)).sum()
                for sign, effect in ((1, self.effect), (-1, 0.0))
            )
        )

    def study(self, rng: np.random.Generator) -> list[Difference]:
        """The method against each rival, judged as one family."""
        difficulty = ITEM_SPREAD * rng.standard_normal(self.items)

        def runs(effect: float) -> Array:
            easy = self.seed_spread * rng.standard_normal((self.seeds, 1))
            own = self.idiosyncrasy * rng.standard_normal((self.seeds, self.items))
            chance = scipy_stats.logistic.cdf(LEVEL + effect + difficulty + easy + own)
            return (rng.random((self.seeds, self.items)) < chance).astype(np.float64)

        mine, weights = runs(self.effect), np.ones(self.items)
        return judge(
            [paired_difference(Pairs(first=mine, second=runs(0.0), weights=weights)) for _ in range(self.rivals)]
        )


@dataclass(frozen=True)
class Counted:
    """Shares over the studies."""

    truth: float
    bootstrap: float
    seed_t: float
    hull: float
    any_claim: float
    """Studies with at least one verdict of a difference."""
    claimed: float
    """Comparisons with one."""
    detectable: float
    """Mean of the least difference that is said to be detectable."""


def counted(world: World, studies: int, seed: int) -> Counted:
    """Draw studies and count."""
    rng, truth = np.random.default_rng(seed), world.truth()
    drawn = [world.study(rng) for _ in range(studies)]
    every = [found for study in drawn for found in study]
    intervals = [
        (found.bootstrap, found.seed_t) for found in every if found.bootstrap is not None and found.seed_t is not None
    ]
    both = [(b, t, (min(b[0], t[0]), max(b[1], t[1]))) for b, t in intervals]
    covers = [[low <= truth <= high for low, high in one] for one in both]
    shares = np.mean(covers, axis=0)
    claims = [[found.verdict in {"higher", "lower"} for found in study] for study in drawn]
    least = [d for found in every if (d := detectable(found)) is not None]
    return Counted(
        truth=truth, bootstrap=float(shares[0]), seed_t=float(shares[1]), hull=float(shares[2]),
        any_claim=float(np.mean([any(study) for study in claims])), claimed=float(np.mean(claims)),
        detectable=float(np.mean(least)),
    )  # fmt: skip


def table(rows: Sequence[tuple[World, Counted]], studies: int) -> str:
    """Markdown, with what the numbers say about the harness's rule."""
    error = 100 * math.sqrt(0.0475 / studies)
    lines = [
        f"{studies} studies a row. Share of comparisons whose 95 % interval covers the truth, by interval; share of",
        "studies that claim any difference (where methods are equal: the family-wise error); share of comparisons",
        "that claim one (where they differ: the power); mean of what is said to be detectable. Accuracy in",
        f"points. With {studies} studies a share of 95 % has a standard error of {error:.1f}",
        "points or less. A claim needs both intervals clear of 0, so a verdict rests on the hull; it covers more than",
        "95 %, which is the price of a bootstrap over three seeds.",
        "",
        "| seeds | items | rivals | between seeds | true difference | bootstrap | seed-level t | hull of both "
        "| any claim | claimed | detectable |",
        "|---" * 11 + "|",
    ]
    for world, found in rows:
        cells = [
            world.seeds, f"{world.items:,}", world.rivals, f"{world.seed_spread:g}", f"{100 * found.truth:+.1f}",
            *(f"{100 * share:.1f} %" for share in (found.bootstrap, found.seed_t, found.hull, found.any_claim)),
            f"{100 * found.claimed:.1f} %", f"{100 * found.detectable:.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    needed = {points: seeds_needed(points, 0.7) for points in (0.5, 1.0, 2.0, 4.0)}
    lines += [
        "",
        "“Between seeds” is the standard deviation of a run's logit. Seeds that 80 % power takes at 0.7 points between",
        "seeds of one method, items aside: "
        + ", ".join(f"{count or 'over 1,000'} for {points:g} points" for points, count in needed.items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def worlds() -> list[World]:
    """Equal and unequal methods, few and more seeds, quiet and noisy ones."""
    shape = {"items": 400, "idiosyncrasy": 1.0}
    return [
        World(seeds=seeds, rivals=rivals, seed_spread=spread, effect=effect, **shape)  # type: ignore[arg-type]
        for effect, rivals in ((0.0, 5), (0.5, 1))
        for seeds in (3, 5)
        for spread in (0.05, 0.2)
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=500)
    parser.add_argument("--out", type=Path, help="also write the table there")
    args = parser.parse_args()
    rows = []
    for number, world in enumerate(worlds()):
        rows.append((world, counted(world, args.studies, number)))
        print(world, rows[-1][1], file=sys.stderr, flush=True)
    text = table(rows, args.studies)
    print(text)
    if args.out is not None:
        write_text(
            args.out,
            f"# Intervals and verdicts on simulated truth\n\nMade by `python -m tests.simulated_truth`.\n\n{text}",
        )


if __name__ == "__main__":
    main()
