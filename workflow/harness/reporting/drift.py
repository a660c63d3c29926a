"""How the order of the layers changes over training: the observer's norms at later steps beside those at step 0.

The observer measures every run on the same rows at every step, so the choice of rows does not blur the comparison; but
a change is worth the name only if it is larger than that between two choices of rows at one step. The study's probes
show how large that is: rank correlations of disjoint sets of batches with as many rows as the observer has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from pandas import DataFrame

from harness.reporting.frames import Frames
from harness.reporting.importance_stats import SPLITS, halves, rank_correlations
from harness.reporting.layout import groups, of_method, trained
from harness.reporting.probed import ALIKE, SAMPLERS, probed_norms
from harness.reporting.stats import ALPHA, MIN_SEEDS, Array, holm, layer_matrix
from harness.study.spec import Study


@dataclass(frozen=True, kw_only=True)
class Noise:
    """How far two choices of rows differ before training, [SPLITS] choices."""

    rows: int
    """In each choice."""
    rho: Array
    moved: dict[str, Array]
    """By key of the sampler: share of draws that move."""


@dataclass(frozen=True, kw_only=True)
class Drift:
    """One method's runs on one model and task."""

    model: str
    task: str
    method: str
    curves: tuple[DataFrame, ...]
    """One a seed: columns `step` and `rho`, the rank correlation with step 0."""
    moved: dict[str, list[float]]
    """By key of the sampler: share of draws that move from step 0 to the last step, one a seed."""
    noise: Noise | None
    """None without a probe of this model and task."""
    p: float | None = None
    p_holm: float | None = None
    verdict: str = ""
    """`changes`, `keeps` or `cannot tell (why)`."""

    @property
    def last(self) -> list[float]:
        """Rank correlation of the last step with step 0, one a seed."""
        return [float(curve["rho"].iloc[-1]) for curve in self.curves]


def drifts(frames: Frames, study: Study) -> list[Drift]:
    """Every method that was observed at two steps at least; p values corrected over all of a model's."""
    found = list(_drifts(frames, study))
    judged = []
    for model in study.models:
        family = [drift for drift in found if drift.model == model]
        known = [drift for drift in family if drift.p is not None]
        corrected = dict(zip(map(id, known), holm([d.p for d in known if d.p is not None]), strict=True))
        of_model = [replace(drift, p_holm=corrected.get(id(drift))) for drift in family]
        judged += [replace(drift, verdict=_verdict(drift)) for drift in of_model]
    return judged


def _drifts(frames: Frames, study: Study) -> Iterator[Drift]:
    for model, task in groups(study):
        noise = observer_noise(frames, study, model, task)
        for method in trained(study):
            curves, moved = [], []
            for run in of_method(frames.ok_runs(), model, task, method)["run"]:
                matrix = layer_matrix(frames.observed_by(run), "gradient_rms").dropna()
                if len(matrix) > 1 and matrix.index[0] == 0:
                    values = matrix.to_numpy(dtype=np.float64)
                    rho = rank_correlations(values, values[:1])
                    curves.append(DataFrame({"step": matrix.index.astype(int), "rho": rho}))
                    moved.append(values[[0, -1]] / values[[0, -1]].mean(axis=1, keepdims=True))
            if curves:
                drift = Drift(
                    model=model,
                    task=task,
                    method=method,
                    curves=tuple(curves),
                    moved={sampler.key: [float(sampler.moved(*ends)) for ends in moved] for sampler in SAMPLERS},
                    noise=noise,
                )
                yield replace(drift, p=_p(drift))


def observer_noise(frames: Frames, study: Study, model: str, task: str) -> Noise | None:
    """Two choices of as many rows as the observer has, compared; None without a probe.

    A probe with too few batches for two such choices gives two halves of it: fewer rows, hence more noise.
    """
    norms = probed_norms(frames, model, task)
    if norms is None:
        return None
    chosen = (frames.probes["model"] == model) & (frames.probes["task"] == task)
    batch_rows = int(frames.probes.loc[chosen, "batch_rows"].iloc[0])
    size = min(len(norms) // 2, max(1, round(study.observation.rows / batch_rows)))
    choices = halves(norms, size)
    return Noise(
        rows=size * batch_rows,
        rho=rank_correlations(*choices),
        moved={sampler.key: sampler.moved(*choices) for sampler in SAMPLERS},
    )


def _p(drift: Drift) -> float | None:
    """Share of the choices of rows that differ as much as the seed that changed least."""
    if drift.noise is None:
        return None
    return float((1 + (drift.noise.rho <= max(drift.last) + 1e-12).sum()) / (SPLITS + 1))


def _verdict(drift: Drift) -> str:
    seeds = len(drift.curves)
    if drift.p_holm is None:
        return "cannot tell (no probe says how far two choices of rows differ)"
    if seeds < MIN_SEEDS:
        return f"cannot tell ({seeds} seed{'s' * (seeds != 1)}, {MIN_SEEDS} are needed)"
    if drift.p_holm < ALPHA:
        return "changes"
    if min(drift.last) > ALIKE:
        return "keeps"
    return "cannot tell (two choices of rows differ as much)"
