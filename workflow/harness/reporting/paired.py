"""Two methods on several suites at once, paired by seed and item."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from harness.reporting.frames import Frames
from harness.reporting.layout import of_method
from harness.reporting.stats import Difference, Pairs, pair_documents, paired_difference


def paired_on(frames: Frames, at: tuple[str, str], pair: tuple[str, str], suites: Sequence[str]) -> Difference:
    """Accuracy of the first method of `pair` minus that of the second, every suite weighing the same.

    Args:
        frames: the study's tables.
        at: model and task.
        pair: the methods; only seeds count whose runs are ok and scored on every suite, with both.
        suites: of the task; without an item in common on one of them nothing is known.
    """
    by_seed = []
    for method in pair:
        runs = of_method(frames.ok_runs(), *at, method)
        scored = [set(frames.scores.loc[frames.scores["suite"] == suite, "run"]) for suite in suites]
        everywhere = set.intersection(*scored)
        known = zip(map(int, runs["seed"]), map(str, runs["run"]), strict=True)
        by_seed.append({seed: run for seed, run in known if run in everywhere})
    parts = [
        pair_documents(frames.documents, first=by_seed[0], second=by_seed[1], suite=suite, value="correct")
        for suite in suites
    ]
    if not all(part.first.size for part in parts):
        return Difference(mean=None, seeds=0, documents=0)
    return paired_difference(
        Pairs(
            first=np.concatenate([part.first for part in parts], axis=1),
            second=np.concatenate([part.second for part in parts], axis=1),
            weights=np.concatenate([part.weights / part.weights.sum() for part in parts]),
        )
    )
