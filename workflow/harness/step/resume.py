"""Resume states of training: weights, method, generators and logs after some step.

They are kept under results/state/, outside every declared output, since Snakemake deletes outputs before a job starts.
The last two of a run are kept, each with a manifest of its size and hash: one that is torn is noticed, and the one
before is taken.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import BaseModel
from torch import nn

from harness.errors import UserError
from harness.records.atomic import sha256, whole_file, write_record
from harness.records.reading import read


class Manifest(BaseModel, extra="forbid", frozen=True):
    """What a resume state is held to before it is read."""

    step: int
    file_bytes: int
    sha256: str


def save(folder: Path, *, step: int, module: nn.Module, frozen: Iterable[nn.Parameter], rest: dict[str, Any]) -> None:
    """Write the state after `step` steps, and keep the newest of those before.

    Args:
        folder: results/state/<run>.
        step: optimizer steps done.
        module: the module that trains; its parameters are saved, except those in `frozen`.
        frozen: weights that the run never changes; they are restored from the model's own folder.
        rest: method state, logs; plain containers, numbers, text and tensors only.

    Raises:
        UserError: the disk is full; the states before are still there.
    """
    there = manifests(folder)
    for old in there[1:]:  # before the new one is written: there is disk for two
        _state(old).unlink(missing_ok=True)
        old.unlink()
    still = {id(p) for p in frozen}
    weights = {name: p.detach() for name, p in module.named_parameters() if id(p) not in still}
    generators = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators["cuda"] = torch.cuda.get_rng_state()
    manifest = folder / f"step{step}.json"
    sizes = [_state(last).stat().st_size for last in there[:1] if _state(last).is_file()]
    with whole_file(_state(manifest), needs_bytes=max(sizes, default=None)) as temporary, temporary.open("wb") as file:
        counted: Any = _Counted(file)
        torch.save({"step": step, "weights": weights, "generators": generators, "rest": rest}, counted)
    made = Manifest(step=step, file_bytes=counted.nbytes, sha256=counted.hash.hexdigest())
    write_record(manifest, made)


def load(folder: Path, module: nn.Module) -> tuple[int, dict[str, Any], list[str]] | None:
    """Restore weights and generators from the newest state that is whole.

    Returns:
        The steps done, `rest`, and a line for each newer state that is not whole; None if there is no state.
    """
    torn = []
    for path in manifests(folder):
        why = _torn(path)
        if why is not None:
            torn.append(f"the resume state {_state(path)} {why}, and was not used")
            continue
        state = torch.load(_state(path), map_location="cpu", weights_only=True)
        parameters = dict(module.named_parameters())
        with torch.no_grad():
            for name, weight in state["weights"].items():
                parameters[name].copy_(weight)
        torch.set_rng_state(state["generators"]["cpu"])
        if "cuda" in state["generators"] and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["generators"]["cuda"])
        return state["step"], state["rest"], torn
    return (0, {}, torn) if torn else None


def manifests(folder: Path) -> list[Path]:
    """Manifests of the states in a folder, newest first."""
    found = [path for path in folder.glob("step*.json") if path.stem.removeprefix("step").isdigit()]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("step")), reverse=True)


def _state(manifest: Path) -> Path:
    return manifest.with_suffix(".pt")


def _torn(manifest: Path) -> str | None:
    """Why a state must not be used; None where it is what its manifest says."""
    path = _state(manifest)
    try:
        made = read(manifest, Manifest)
    except UserError:
        return "has a damaged manifest"
    if not path.is_file():
        return "is gone"
    if path.stat().st_size != made.file_bytes or sha256(path) != made.sha256:
        return "is not what was written"
    return None


class _Counted(io.RawIOBase):
    """A file that hashes and counts what is written to it, so that it need not be read again."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file, self.hash, self.nbytes = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Write all of `data`, which is bytes of some kind."""
        self.hash.update(data)
        self.nbytes += len(data)
        return self._file.write(data)
