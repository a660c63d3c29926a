"""Probes made up for a study's tables: batches of known importance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from harness.records.columns import ALL, FRAMES, NORMS
from harness.reporting.frames import Frames, rows_to_frame
from harness.reporting.stats import Array

ROWS = 4
SIZES = {"mlp": 300, "self_attn": 150, NORMS: 10}


def batches_of(truth: Array, *, seed: int, count: int = 24, noise: float = 0.1) -> Array:
    """Norms [batches, layers] around `truth`, each batch with a size of its own."""
    rng = np.random.default_rng(seed)
    size = 0.3 * rng.standard_normal((count, 1))
    return np.asarray(1e-3 * truth * np.exp(size + noise * rng.standard_normal((count, len(truth)))))


def with_probes(frames: Frames, model: str, norms: Mapping[str, Array | str]) -> Frames:
    """The same frames with a probe for each task; text in place of norms is the reason of one that went out of memory.

    A third of each layer's squared norm is in its norms, although these are ten of its 460 parameters.
    """
    rows: dict[str, list[dict[str, Any]]] = {"probes": [], "probed": []}
    for task, values in norms.items():
        ok = not isinstance(values, str)
        rows["probes"].append(
            dict.fromkeys(FRAMES["probes"])
            | {
                "probe": f"{model}--{task}--0", "model": model, "task": task, "status": "ok" if ok else "oom",
                "status_why": None if ok else values, "batches": len(values) if ok else 0, "batch_rows": ROWS,
                "prompt": "plain", "max_length": 128, "weight_dtype": "fp32", "train_rows": 1000,
                "truncated_rows": 200 if ok else None,
            }
        )  # fmt: skip
        if not isinstance(values, str):
            rows["probed"] += [row for number, batch in enumerate(values) for row in _batch(model, task, number, batch)]
    return replace(frames, **{name: rows_to_frame(name, found) for name, found in rows.items()})


def _batch(model: str, task: str, number: int, batch: Array) -> list[dict[str, Any]]:
    total = sum(SIZES.values())
    keys = {"probe": f"{model}--{task}--0", "model": model, "task": task, "batch": number}
    keys |= {"loss": 2.0 + number, "tokens": 100, "label_tokens": 50}
    rows = []
    for layer, r in enumerate(batch):
        parts = {kind: (size, float(r) * (total / (3 * size)) ** 0.5) for kind, size in SIZES.items()}
        for kind, (size, value) in {ALL: (total, float(r)), **parts}.items():
            rows.append(keys | {"layer": layer, "kind": kind, "parameters": size, "gradient_rms": value})
    return rows
