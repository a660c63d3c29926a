"""Statistics of a study: means over seeds, paired differences with honest intervals, Holm, rank correlation.

What a bootstrap over three seeds can say. With three clusters there are only ten distinct resamples of seeds, so the
percentile interval is little wider than the range of the three values: as a statement about *other* seeds its coverage
is well below 95 % (about 75 % when documents add no noise). It does carry the noise of the documents. A t interval on
the per-seed differences has the opposite strengths: with 2 degrees of freedom it is wide (4.3 standard errors) and
right for the noise between seeds, but it takes the documents as given. So a claim needs both: both intervals must
exclude 0, and the larger of the two p values, after Holm's correction, must be below 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import median
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pandas import DataFrame, Series
from scipy import special

Array = NDArray[np.float64]

RESAMPLES = 4000
BOOTSTRAP_SEED = 20260409
ALPHA = 0.05
POWER = 0.8
MIN_SEEDS = 3
KEPT_DOCUMENTS = 2000
"""Up to so many, draws are kept for the next two methods (32 MB): they take longer than what is done with them."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Mean, sample standard deviation (n - 1) and number of values; None where undefined."""

    mean: float | None
    sd: float | None
    n: int


def median_or_none(values: Iterable[float]) -> float | None:
    """The median; None if there are no values."""
    known = [float(value) for value in values]
    return median(known) if known else None


def summarise(values: Sequence[float]) -> Summary:
    """Summary of one value a seed."""
    n = len(values)
    if n == 0:
        return Summary(mean=None, sd=None, n=0)
    mean = math.fsum(values) / n
    sd = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)) if n > 1 else None
    return Summary(mean=mean, sd=sd, n=n)


# ---------------------------------------------------------------- paired differences


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Outcomes of two methods on the same documents under the same seeds."""

    first: Array
    """[seeds, documents]"""
    second: Array
    """[seeds, documents]"""
    weights: Array
    """[documents]: 1 for accuracy, answer tokens for a loss per token."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean of first minus second with its two 95 % intervals; None where too little is known."""

    mean: float | None
    seeds: int
    documents: int
    bootstrap: tuple[float, float] | None = None
    seed_t: tuple[float, float] | None = None
    p: float | None = None
    """The larger of the bootstrap's and the t test's two-sided p value."""
    p_holm: float | None = None
    seeds_alone: bool = False
    """One number a run was known and none of its documents: there is no bootstrap, and the t interval decides."""
    verdict: str = ""
    """"higher", "lower" or "no claim (why)"."""


def pair_documents(
    documents: DataFrame,
    *,
    first: Mapping[int, str],
    second: Mapping[int, str],
    suite: str,
    value: Literal["correct", "correct_normalised", "loss", "value"],
) -> Pairs:
    """Line up two methods' documents.

    Args:
        documents: the `documents` table.
        first: the runs of one method, by seed; only seeds that both have are used.
        second: the runs of the other.
        suite: the suite.
        value: `correct` and its like (every document weighs 1) or `loss` (weighed by the answer's tokens, so that
            the weighted mean is the held-out loss per token).

    Only documents with a value in all of these runs are used.

    Raises:
        ValueError: a run has the same document twice.
    """
    seeds = sorted(first.keys() & second.keys())
    chosen = documents[documents["suite"] == suite]
    wanted = [runs[seed] for runs in (first, second) for seed in seeds]
    # grouped once: a filter a run takes a time that grows as the square of the runs
    by_run = dict(iter(chosen[chosen["run"].isin(wanted)].groupby("run")))
    columns: list[Series[Any]] = []
    for runs in (first, second):
        for seed in seeds:
            of_run = by_run.get(runs[seed], chosen.iloc[:0]).set_index("document")
            if of_run.index.has_duplicates:
                raise ValueError(f"documents: run {runs[seed]}, suite {suite}: a document stands there twice")
            columns.append(of_run[value].astype("Float64").rename(f"{len(columns)}"))
    if not columns:
        empty = np.zeros((0, 0))
        return Pairs(first=empty, second=empty, weights=np.zeros(0))
    joined = DataFrame({c.name: c for c in columns}).dropna().sort_index()
    table = joined.to_numpy(dtype=np.float64).T
    if value == "loss":
        tokens = chosen.groupby("document")["tokens"].max().reindex(joined.index)
        weights = tokens.to_numpy(dtype=np.float64)
    else:
        weights = np.ones(len(joined))
    return Pairs(first=table[: len(seeds)], second=table[len(seeds) :], weights=weights)


def paired_difference(pairs: Pairs) -> Difference:
    """Difference of two methods with a hierarchical bootstrap and a seed-level t interval; no verdict yet.

    Seeds and documents are crossed (every seed answers the same documents), so a replicate resamples seeds and,
    independently, documents (the "pigeonhole" bootstrap, on the safe side for crossed data).
    """
    delta = pairs.first - pairs.second
    seeds, documents = delta.shape
    if seeds == 0 or documents == 0:
        return Difference(mean=None, seeds=seeds, documents=documents)
    weighted = delta * pairs.weights
    by_seed = weighted.sum(axis=1) / pairs.weights.sum()
    result = Difference(mean=float(by_seed.mean()), seeds=seeds, documents=documents)
    if seeds < 2:
        return result
    replicates = _replicates(weighted, pairs.weights)
    low, high = np.quantile(replicates, [ALPHA / 2, 1 - ALPHA / 2])
    tail = min(int((replicates <= 0).sum()), int((replicates >= 0).sum()))
    p_bootstrap = min(1.0, 2 * (tail + 1) / (RESAMPLES + 1))
    result = replace(result, bootstrap=(float(low), float(high)))
    by_t = _seed_t(by_seed)
    return result if by_t is None else replace(result, seed_t=by_t[0], p=max(p_bootstrap, by_t[1]))


def seed_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """Difference of two methods of which one number a seed is known, with the seed-level t interval alone."""
    seeds = sorted(first.keys() & second.keys())
    by_seed = np.array([first[seed] - second[seed] for seed in seeds])
    result = Difference(mean=float(by_seed.mean()) if seeds else None, seeds=len(seeds), documents=0, seeds_alone=True)
    by_t = _seed_t(by_seed) if len(seeds) > 1 else None
    return result if by_t is None else replace(result, seed_t=by_t[0], p=by_t[1])


def _seed_t(by_seed: Array) -> tuple[tuple[float, float], float] | None:
    """The t interval of two or more differences and its p value; None without a spread between them."""
    seeds = len(by_seed)
    error = float(by_seed.std(ddof=1)) / math.sqrt(seeds)
    if error < 1e-12:  # no spread between seeds: a t interval of width 0 would claim a certainty nobody has
        return None
    mean = float(by_seed.mean())
    # of scipy.special, which scipy.stats calls for them: that package takes half a second to import
    reach = float(special.stdtrit(seeds - 1, 1 - ALPHA / 2)) * error
    return (mean - reach, mean + reach), 2 * float(special.stdtr(seeds - 1, -abs(mean) / error))


def detectable(found: Difference) -> float | None:
    """Least difference that as many seeds and documents show in 80 % of cases, at two-sided 5 %; None if unknown.

    From the wider of the two intervals, and for a true difference whose spread is the one that was seen.
    """
    if found.seed_t is None:
        return None
    asked = np.array([POWER, 1 - ALPHA / 2])
    t, normal = special.stdtrit(found.seeds - 1, asked), special.ndtri(asked)
    by_t = _half(found.seed_t) * (1 + float(t[0] / t[1]))
    by_bootstrap = _half(found.bootstrap or (0, 0)) * (1 + float(normal[0] / normal[1]))
    return max(by_t, by_bootstrap)


def _half(interval: tuple[float, float]) -> float:
    return (interval[1] - interval[0]) / 2


def document_interval(pairs: Pairs) -> tuple[float, float] | None:
    """95 % bootstrap interval of first minus second over documents alone, with the seeds as they are."""
    if not pairs.first.size:
        return None
    delta = (pairs.first - pairs.second).mean(axis=0) * pairs.weights
    low, high = np.quantile(_replicates(delta[None, :], pairs.weights), [ALPHA / 2, 1 - ALPHA / 2])
    return float(low), float(high)


def _replicates(weighted: Array, weights: Array) -> Array:
    """Bootstrap replicates of the weighted mean, [RESAMPLES]; drawn in blocks to bound memory."""
    seeds, documents = weighted.shape
    draws = _kept_draws(seeds, documents) if documents <= KEPT_DOCUMENTS else _draws(seeds, documents)
    made = []
    for drawn_seeds, drawn_documents in draws:
        sums = ((drawn_documents @ weighted.T) * drawn_seeds).sum(axis=1)
        made.append(sums / (drawn_documents @ weights))
    return np.concatenate(made)


def _draws(seeds: int, documents: int) -> Iterator[tuple[Array, NDArray[np.int32]]]:
    """Blocks of replicates: each seed's share [replicates, seeds], each document's count [replicates, documents]."""
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    for _ in range(0, RESAMPLES, 500):
        drawn_seeds = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=500) / seeds
        drawn_documents = generator.multinomial(documents, np.full(documents, 1 / documents), size=500)
        yield drawn_seeds, drawn_documents.astype(np.int32)


@lru_cache(maxsize=2)
def _kept_draws(seeds: int, documents: int) -> list[tuple[Array, NDArray[np.int32]]]:
    return list(_draws(seeds, documents))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = running
    return corrected


def judge(differences: Sequence[Difference]) -> list[Difference]:
    """Correct the p values of one family (all rivals on one suite and measure) and write the verdicts."""
    known = [(i, d.p) for i, d in enumerate(differences) if d.p is not None]
    corrected = dict(zip([i for i, _ in known], holm([p for _, p in known]), strict=True))
    judged = [replace(d, p_holm=corrected.get(i)) for i, d in enumerate(differences)]
    return [replace(d, verdict=_verdict(d)) for d in judged]


def _verdict(d: Difference) -> str:
    if d.mean is None:
        return "no claim (no seeds or no documents in common)"
    if d.seeds < MIN_SEEDS:
        return f"no claim ({d.seeds} seed{'s' * (d.seeds != 1)} in common, {MIN_SEEDS} are needed)"
    if (d.bootstrap is None and not d.seeds_alone) or d.seed_t is None or d.p_holm is None:
        return "no claim (all seeds show the very same difference: no spread to judge by)"
    intervals = {"bootstrap": d.bootstrap, "seed-level t": d.seed_t}
    covers = [name for name, ends in intervals.items() if ends is not None and ends[0] <= 0 <= ends[1]]
    if covers:
        return f"no claim ({' and '.join(covers)} interval{'s' * (len(covers) > 1)} cover{'s' * (len(covers) == 1)} 0)"
    if d.p_holm >= ALPHA:
        return f"no claim (p = {d.p_holm:.2f} after Holm's correction)"
    return "higher" if d.mean > 0 else "lower"


# ---------------------------------------------------------------- importance


def effective_layers(probability: Sequence[float]) -> float:
    """Exp of the entropy of the sampling probabilities: L when all layers are equally likely, 1 when one takes all."""
    p = np.asarray(probability, dtype=np.float64)
    p = p[p > 0] / p.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rho; None where one side is constant, since ranks then say nothing."""
    if len(first) < 2 or len(set(first)) == 1 or len(set(second)) == 1:
        return None
    first_ranks, second_ranks = (Series(side).rank().to_numpy() for side in (first, second))
    return float(np.corrcoef(first_ranks, second_ranks)[1, 0])


def layer_matrix(rows: DataFrame, column: str) -> DataFrame:
    """One run's values as a matrix: index = step, columns = layer. Nulls become NaN."""
    return rows.pivot(index="step", columns="layer", values=column).astype("float64").sort_index()


def agreement(believed: DataFrame, observed: DataFrame) -> DataFrame:
    """Rank correlation over layers between believed importance and observed gradient RMS.

    Args:
        believed: one run's rows of the `believed` table; a row holds until the next one.
        observed: the same run's rows of the `observed` table.

    Returns:
        Columns `step` and `rho`, one row an observed step for which there was a belief; rho is NaN where undefined.
    """
    belief = layer_matrix(believed, "importance")
    truth = layer_matrix(observed, "gradient_rms")
    rows = []
    for step in truth.index:
        earlier = belief.index[belief.index <= step]
        if len(earlier) == 0:
            continue
        held, seen = belief.loc[earlier[-1]], truth.loc[step]
        both = held.notna() & seen.notna()
        if both.sum() >= 2:
            rho = rank_correlation(held[both].tolist(), seen[both].tolist())
            rows.append({"step": int(step), "rho": math.nan if rho is None else rho})
    return DataFrame(rows, columns=["step", "rho"])
