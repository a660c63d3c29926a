"""Draw docs/img/fidelity.png: fifty steps of four methods beside their authors' packages.

    .venv/bin/python docs/figures/fidelity.py

Needs the packages of tests/fidelity/packages.txt (`make test` installs them), and drives both as the fidelity tests do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))
OUT = ROOT / "docs" / "img" / "fidelity.png"
STEPS = 50


def curves(patch: pytest.MonkeyPatch) -> dict[str, tuple[list[float], list[float]]]:
    """Losses of ours and of the package, by method."""
    import test_adalomo
    import test_apollo
    import test_badam
    import test_galore

    from baselines.badam import Badam
    from baselines.galore import GaLore

    def recorded(module: Any, call: Callable[[], object]) -> tuple[list[float], list[float]]:
        kept: dict[str, list[float]] = {}
        with patch.context() as inner:
            for name in ("run", "run_beside"):
                real = getattr(module, name)
                inner.setattr(module, name, lambda *a, real=real, name=name: kept.setdefault(name, real(*a)))
            call()
        return kept["run"], kept["run_beside"]

    found = {
        "GaLore": recorded(test_galore, lambda: test_galore.beside_for_50_steps(GaLore)),
        "APOLLO": recorded(
            test_apollo,
            lambda: test_apollo.beside(test_apollo.SeededAsThePackage, test_apollo.CHANNEL, steps=STEPS),
        ),
    }
    found["AdaLomo"] = test_adalomo.losses_of_50_steps(patch)
    options = {"sample_every": 5, "order": "ascending"}
    driven = test_badam.Driven(Badam, options, weight_decay=0.01)
    driven.method.begin_step(0)
    begin = driven.method.begin_step
    driven.method.begin_step = lambda step: begin(step + 1)
    driven.run(0, STEPS, factor=test_badam.decay)
    import torch

    _, theirs = test_badam.package_by_hand("ascending", torch.float32, STEPS)
    found["BAdam"] = (driven.losses, theirs)
    return found


def draw(found: dict[str, tuple[list[float], list[float]]]) -> None:
    """Curves above, their difference below."""
    figure, axes = plt.subplots(2, len(found), figsize=(9.6, 3.9), sharex=True, layout="constrained")
    for column, (name, (ours, theirs)) in enumerate(found.items()):
        above, below = axes[0][column], axes[1][column]
        above.plot(ours, color="#0072b2", linewidth=1.4, label="ours")
        above.plot(theirs, "o", color="#d55e00", markersize=2.6, markerfacecolor="none", label="authors' package")
        above.set_title(name, loc="left", fontsize=9)
        gap = np.abs(np.array(ours) - np.array(theirs))
        below.plot(gap, color="#444444", linewidth=1)
        below.set_ylim(-1e-7, 2e-6)
        below.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        below.set_xlabel("step")
        if not gap.any():
            below.text(0.5, 0.5, "equal to the last bit", ha="center", transform=below.transAxes, fontsize=8)
    axes[0][0].set_ylabel("loss (nats per token)")
    axes[1][0].set_ylabel("difference (nats)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(OUT, dpi=160, metadata={"Software": None})


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as monkeypatch:
        draw(curves(monkeypatch))
    print(OUT.relative_to(ROOT))
