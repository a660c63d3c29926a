"""Resume state of a training run: weights, method, generators and logs after some step, written atomically to one file.

It is kept under results/state/, outside every declared output, since Snakemake deletes outputs before a job starts.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.records.atomic import whole_file

FILE = "state.pt"


def save(folder: Path, *, step: int, module: nn.Module, frozen: Iterable[nn.Parameter], rest: dict[str, Any]) -> None:
    """Write the state after `step` steps.

    Args:
        folder: results/state/<run>.
        step: optimizer steps done.
        module: the module that trains; its parameters are saved, except those in `frozen`.
        frozen: weights that the run never changes; they are restored from the model's own folder.
        rest: method state, logs; plain containers, numbers, text and tensors only.
    """
    still = {id(p) for p in frozen}
    weights = {name: p.detach() for name, p in module.named_parameters() if id(p) not in still}
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state()
    with whole_file(folder / FILE) as temporary:
        torch.save({"step": step, "weights": weights, "generators": generators, "rest": rest}, temporary)


def load(folder: Path, module: nn.Module) -> tuple[int, dict[str, Any]] | None:
    """Restore weights and generators; returns the steps done and `rest`, or None if there is no resume state."""
    path = folder / FILE
    if not path.exists():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True)
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, weight in state["weights"].items():
            parameters[name].copy_(weight)
    torch.set_rng_state(state["generators"]["cpu"])
    if "cuda" in state["generators"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["generators"]["cuda"])
    return state["step"], state["rest"]
