"""Importance before training, from a study's probes: what they measured, and in which pairs of tasks it differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from baselines.grass import GrassOptions
from harness.records.columns import ALL
from harness.reporting.frames import Frames
from harness.reporting.importance_stats import (
    Estimate,
    between_halves,
    estimate,
    halves,
    moved_share,
    rank_correlations,
    relative_means,
    resampled,
    same_order_p,
    sampling_probabilities,
    temperatures_for,
)
from harness.reporting.stats import ALPHA, Array, holm
from harness.study.spec import Study

SHARE = GrassOptions().target
"""Effective share of the layers of the sampler that finds its temperature: GRASS's default."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A softmax of the norms divided by their mean, with a fixed temperature or with one that gives a share."""

    key: str
    """In names of columns."""
    name: str
    temperature: float | None
    """None: found for each measurement, so that `SHARE` of the layers is effective."""

    def probabilities(self, relative: Array) -> Array:
        """Of each layer, [..., layers], from `importance_stats.relative_means`."""
        tau: float | Array = self.temperature or temperatures_for(relative, SHARE)[..., None]
        return sampling_probabilities(relative, tau)

    def moved(self, first: Array, second: Array) -> Array:
        """Share of draws that go to other layers with the second measurement than with the first."""
        return moved_share(self.probabilities(first), self.probabilities(second))


PLAIN = tuple(Sampler(key=f"tau_{tau:g}", name=f"tau {tau:g}", temperature=tau) for tau in (1.0, 0.25))
SAMPLERS = (*PLAIN, Sampler(key=f"auto_{SHARE:g}", name=f"auto {SHARE:g}", temperature=None))
ALIKE = 0.9
"""Ours: two tasks have the same order for all purposes if their rank correlation is surely above this."""


@dataclass(frozen=True, kw_only=True)
class OfTask:
    """One task's probe."""

    norms: Array
    """Root mean square of the gradient's entries, [batches, layers]."""
    halves: float
    """Rank correlation of two halves of the batches, mean over random halves: the ceiling of any comparison."""
    halves_moved: Mapping[str, float]
    """By key of the sampler: share of draws that move if one half of the batches is used and not the other."""

    @property
    def relative(self) -> Array:
        """Mean norms divided by their mean over layers, [layers]."""
        return relative_means(self.norms)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two tasks on one model."""

    first: str
    second: str
    rho: Estimate
    """Rank correlation of the mean norms of all batches."""
    halves: float
    """Rank correlation of a half of one task's batches and a half of the other's, to be compared with `ceiling`."""
    ceiling: float
    """Mean of both tasks' `OfTask.halves`."""
    p: float
    """Of "both tasks have one order"."""
    moved: Mapping[str, Estimate]
    """By key of the sampler: share of draws that go to other layers with the other task's probabilities."""
    halves_moved: Mapping[str, float]
    """The same of two halves of one task, mean of both tasks."""
    p_holm: float = 1.0
    verdict: str = ""
    """`differ`, `alike` or `cannot tell`."""


def probed_norms(frames: Frames, model: str, task: str, kind: str = ALL) -> Array | None:
    """Norms of one probe, [batches, layers with such a block]; None if there is none that ended ok."""
    probes = frames.probes
    ok = probes[(probes["model"] == model) & (probes["task"] == task) & (probes["status"] == "ok")]
    rows = frames.probed[frames.probed["probe"].isin(list(ok["probe"])) & (frames.probed["kind"] == kind)]
    if rows.empty:
        return None
    return rows.pivot(index="batch", columns="layer", values="gradient_rms").to_numpy(dtype=np.float64)


def probed_tasks(frames: Frames, study: Study, model: str) -> dict[str, OfTask]:
    """Every task of the model whose probe ended ok, in the order of the config."""
    found = {}
    for task in study.tasks:
        norms = probed_norms(frames, model, task)
        if norms is not None:
            found[task] = _of_task(norms)
    return found


def _of_task(norms: Array) -> OfTask:
    one, other = halves(norms)
    return OfTask(
        norms=norms,
        halves=float(rank_correlations(one, other).mean()),
        halves_moved={sampler.key: float(sampler.moved(one, other).mean()) for sampler in SAMPLERS},
    )


def compared(tasks: Mapping[str, OfTask]) -> list[Pair]:
    """Every pair of tasks of one model, p values corrected over all of them."""
    # every task has a stream of its own, so that one resample of a task serves all its pairs
    drawn = {name: Resampled.of(task.norms, stream) for stream, (name, task) in enumerate(tasks.items())}
    found = [_pair(first, second, tasks, drawn) for first, second in combinations(tasks, 2)]
    corrected = holm([pair.p for pair in found])
    return [
        replace(pair, p_holm=p, verdict="differ" if p < ALPHA else "alike" if pair.rho.low > ALIKE else "cannot tell")
        for pair, p in zip(found, corrected, strict=True)
    ]


@dataclass(frozen=True)
class Resampled:
    """Bootstrap replicates of one task's probe."""

    relative: Array
    """[replicates, layers]."""
    probabilities: Mapping[str, Array]
    """Of each sampler by its key, [replicates, layers]."""

    @classmethod
    def of(cls, norms: Array, stream: int) -> Resampled:
        """Replicates of norms [batches, layers]."""
        relative = resampled(norms, stream)
        return cls(relative, {sampler.key: sampler.probabilities(relative) for sampler in SAMPLERS})


def _pair(first: str, second: str, tasks: Mapping[str, OfTask], drawn: Mapping[str, Resampled]) -> Pair:
    a, b = tasks[first], tasks[second]
    one, other = drawn[first], drawn[second]
    rho = float(rank_correlations(a.relative, b.relative))
    moved = {
        sampler.key: estimate(
            float(sampler.moved(a.relative, b.relative)),
            moved_share(one.probabilities[sampler.key], other.probabilities[sampler.key]),
            least=0.0,
            most=1.0,
        )
        for sampler in SAMPLERS
    }
    return Pair(
        first=first,
        second=second,
        rho=estimate(rho, rank_correlations(one.relative, other.relative), least=-1.0, most=1.0),
        halves=between_halves(a.norms, b.norms, rank_correlations),
        ceiling=(a.halves + b.halves) / 2,
        p=same_order_p(a.norms, b.norms),
        moved=moved,
        halves_moved={key: (share + b.halves_moved[key]) / 2 for key, share in a.halves_moved.items()},
    )
