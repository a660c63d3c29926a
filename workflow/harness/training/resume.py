"""Resume state of a training run: weights, method, generators and logs after some step, written atomically to one file.

It is kept under results/state/, outside every declared output, since Snakemake deletes outputs before a job starts.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness.records.atomic import whole_file, write_json
from harness.records.code import Roots, code_of
from harness.records.reading import read_json

FILE = "state.pt"
_MADE_FROM = "made_from.json"


def with_code(made_from: Mapping[str, str], roots: Roots) -> dict[str, str]:
    """What states are made from, with the code that makes them."""
    return {**made_from, "code": code_of(roots).sha256}


def claim(folder: Path, made_from: Mapping[str, str]) -> str | None:
    """Say what the states in a folder are made from, and drop those that were made from something else.

    Args:
        folder: results/state/<run or search>.
        made_from: by role, what must be the same for a state to go on: hashes of files and of code, the learning rate.

    Returns:
        A line for the record if states were dropped.
    """
    note, path = None, folder / _MADE_FROM
    if folder.exists() and any(folder.iterdir()):
        before: dict[str, str] = read_json(path) if path.is_file() else {}
        differs = sorted(role for role in before.keys() | made_from.keys() if before.get(role) != made_from.get(role))
        if path.is_file() and not differs:
            return None
        shutil.rmtree(folder)
        note = f"a resume state was dropped: it was made from another {differs[0] if differs else 'model, or unknown'}"
    write_json(path, dict(made_from))
    return note


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
