"""Verdicts on a paper's claims, computed: holds, does not hold, cannot tell; of a proxy what was seen, no more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from pandas import DataFrame

from harness.reporting.frames import Frames
from harness.reporting.layout import of_method
from harness.reporting.paired import paired_on
from harness.reporting.published import Published
from harness.reporting.published_claims import (
    Claim,
    Claims,
    Comparison,
    Elsewhere,
    Order,
    Spread,
    items_needed,
    seeds_needed,
)
from harness.reporting.quantities import QUANTITIES, values
from harness.reporting.stats import MIN_SEEDS, detectable
from harness.reporting.table import UNKNOWN, Footnotes, Table, number, signed

HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot tell"
_SEEN = {HOLDS: "seen as claimed", FAILS: "not seen as claimed"}
"""What a protocol that may not be the paper's can say."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One claim on one model."""

    claim: str
    model: str
    published: str
    measured: str
    verdict: str
    """`holds`, `does not hold`, `cannot tell (why)`; of a proxy `proxy: ...`; of a stand-in `no verdict (...)`."""
    needed: str
    runs: int


def verdicts(frames: Frames, claims: Claims, published: Published | None) -> list[Verdict]:
    """Every claim, on every model that it is about."""
    strange = {} if published is None else published.stand_ins(frames)
    made = []
    for label, claim in claims.claims.items():
        for found in _judged(label, claim, frames, claims):
            made.append(_as_protocol_allows(found, claim, strange))
    return made


def _as_protocol_allows(found: Verdict, claim: Claim, strange: Mapping[str, str]) -> Verdict:
    said = found.verdict
    if found.model in strange and found.runs:
        said = f"no verdict (stand-in: {strange[found.model]})"
    elif claim.protocol_match != "exact" and said in _SEEN:
        said = f"{claim.protocol_match if claim.protocol_match == 'proxy' else 'protocol unknown'}: {_SEEN[said]}"
    return Verdict(**{**found.__dict__, "verdict": said})


def _judged(label: str, claim: Claim, frames: Frames, claims: Claims) -> Iterator[Verdict]:
    if isinstance(claim, Comparison):
        for model, points in claim.points.items():
            yield _difference(label, claim, frames, claims, model, points)
    elif isinstance(claim, Order):
        yield _order(label, claim, frames)
    elif isinstance(claim, Spread):
        for model, points in claim.points.items():
            yield _spread(label, claim, frames, model, points)
    else:
        yield _elsewhere(label, claim)


def _difference(label: str, claim: Comparison, frames: Frames, claims: Claims, model: str, points: float) -> Verdict:
    found = paired_on(frames, (model, claim.task), (claim.method, claim.against), claim.suites)
    away = points - claim.bar
    seeds, items = seeds_needed(away, claims.seed_sd), items_needed(away, claims.disagreement)
    ends = [100 * end for interval in (found.bootstrap, found.seed_t) if interval is not None for end in interval]
    shown = UNKNOWN
    if found.mean is None:
        verdict = f"{OPEN} (no runs of {claim.method} and {claim.against} to compare)"
    else:
        shown = f"{signed(100 * found.mean, 2)} points"
        shown += f" ({number(min(ends), 2)} to {number(max(ends), 2)})" if ends else ""
        if found.seeds < MIN_SEEDS or not ends:
            verdict = f"{OPEN} ({found.seeds} seed{'s' * (found.seeds != 1)} in common, {MIN_SEEDS} are needed)"
        else:
            verdict = _by_interval(claim, min(ends), max(ends))
            least = detectable(found)
            if verdict == OPEN and least is not None:
                verdict = f"{OPEN} (the interval covers the margin; {number(100 * least, 2)} points would have shown)"
    return Verdict(
        claim=label, model=model, published=f"{signed(points, 2)} points", measured=shown, verdict=verdict,
        needed=f"{seeds or 'over 1,000'} seeds, {UNKNOWN if items is None else f'{items:,}'} items", runs=found.seeds,
    )  # fmt: skip


def _by_interval(claim: Comparison, low: float, high: float) -> str:
    if claim.expects == "below":
        return HOLDS if high < claim.bar else FAILS if low > claim.bar else OPEN
    return HOLDS if low > claim.bar else FAILS if high < claim.bar else OPEN


def _order(label: str, claim: Order, frames: Frames) -> Verdict:
    peaks = {
        method: values(frames, of_method(frames.ok_runs(), claim.model, claim.task, method), "peak_memory", ())
        for method in claim.methods
    }
    known = {method: QUANTITIES["peak_memory"].factor * max(found) for method, found in peaks.items() if found}
    missing = [method for method in claim.methods if method not in known]
    if missing:
        verdict = f"{OPEN} (no device memory of {', '.join(missing)})"
    else:
        near = [
            (a, b)
            for a, b in pairwise(claim.methods)
            if abs(known[a] - known[b]) <= claim.margin * max(known[a], known[b])
        ]
        wrong = any(known[a] > known[b] for a, b in pairwise(claim.methods) if (a, b) not in near)
        tied = ", ".join(f"{a} and {b}" for a, b in near)
        verdict = FAILS if wrong else f"{OPEN} ({tied} are within {100 * claim.margin:.0f} %)" if near else HOLDS
    return Verdict(
        claim=label, model=claim.model,
        published=" < ".join(f"{m} {number(v, 2)}" for m, v in zip(claim.methods, claim.gigabytes, strict=True)),
        measured=", ".join(f"{method} {number(value, 2)} GiB" for method, value in known.items()) or UNKNOWN,
        verdict=verdict, needed="1 run a method", runs=len(known),
    )  # fmt: skip


def _spread(label: str, claim: Spread, frames: Frames, model: str, points: float) -> Verdict:
    runs = of_method(frames.ok_runs(), model, claim.task, claim.method)
    found = [100 * value for value in values(frames, runs, "accuracy", claim.suites)]
    shown = UNKNOWN
    if len(found) < claim.seeds:
        verdict = f"{OPEN} ({len(found)} seed{'s' * (len(found) != 1)}, {claim.seeds} are needed)"
    else:
        spread = float(np.std(found, ddof=1))
        shown = f"{number(spread, 2)} points over {len(found)} seeds"
        verdict = HOLDS if spread <= claim.ratio * points else FAILS
    return Verdict(
        claim=label, model=model, published=f"{number(points, 2)} points", measured=shown, verdict=verdict,
        needed=f"{claim.seeds} seeds", runs=len(found),
    )  # fmt: skip


def _elsewhere(label: str, claim: Elsewhere) -> Verdict:
    value = UNKNOWN if claim.value is None else f"{claim.value:g} {claim.unit}".strip()
    return Verdict(
        claim=label, model=UNKNOWN, published=value, measured=UNKNOWN,
        verdict=f"{OPEN} (decided by {claim.study}: {claim.decides})", needed=UNKNOWN, runs=0,
    )  # fmt: skip


def verdict_table(frames: Frames, claims: Claims, published: Published | None) -> Table:
    """One row a claim and model."""
    notes = Footnotes()
    found = verdicts(frames, claims, published)
    raw, display = [], []
    for one in found:
        claim = claims.claims[one.claim]
        raw.append(
            {"says": claim.says, "table": claim.table, "source": claim.source, "tier": claim.tier}
            | {"protocol_match": claim.protocol_match}
            | one.__dict__
        )
        display.append(
            {"claim": claim.says + (notes.mark(claim.note) if claim.note else ""), "where": claim.table}
            | {"model": one.model, "paper": one.published, "measured": one.measured, "verdict": one.verdict}
            | {"80 % power takes": one.needed, "source": f"{claim.source}, {claim.tier}"}
        )
    notes.add(claims.protocol)
    notes.add(
        "Only an exact protocol may contradict the paper; of a proxy it is said what was seen. Intervals are the hull "
        "of the bootstrap's and the t interval, paired by seed and item, every suite weighing the same. Seeds needed: "
        f"paired t test, {claims.seed_sd:g} points between seeds of one method (assumed). Items needed: two runs that "
        f"differ on {100 * claims.disagreement:.0f} % of items (assumed)."
    )
    for letter, text in claims.sources.items():
        notes.add(f"Source {letter}: {text}")
    return Table(
        name="claims", caption=f"{claims.title}: every claim, and what this study says of it.",
        raw=DataFrame(raw), display=DataFrame(display), footnotes=notes.lines(),
    )  # fmt: skip
