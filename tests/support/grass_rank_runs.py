"""What ranks of GRASS train, each with its part of every batch; `run_case` is also what a test runs in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from grass_tiny import batch, llama, weights
from torch import Tensor, nn

from grass import Grass

STEPS = 11
LIMIT = 0.5
"""Of the global gradient norm."""

COMMON: dict[str, Any] = {
    "lr": 1e-2,
    "active_layers": 2,
    "sample_every": 3,
    "refresh_every": 6,
    "weight_decay": 0.1,
    "max_grad_norm": LIMIT,
    "temperature": 0.2,
}
CASES: dict[str, dict[str, Any]] = {
    "importance": {},
    "uniform": {"sampler": "uniform"},
    "bf16": {"dtype": torch.bfloat16},
    "bf16 rounded stochastically": {"dtype": torch.bfloat16, "stochastic_rounding": True, "state_dtype": "bf16"},
    "probed in step": {"probe_steps": 3},
    "reprobed": {"reprobe": True},
    "accumulated": {"accumulation_steps": 2},
    "decoder layers alone": {
        "train_embedding": False,
        "train_head": False,
        "train_final_norm": False,
        "state": "reset",
        "max_grad_norm": 0.05,
    },
}
WHOLE = "whole"


def half(seed: int, part: int | str) -> dict[str, Tensor]:
    """One of a batch's two sequences, or (`WHOLE`) both."""
    return {key: value if part == WHOLE else value[[part]] for key, value in batch(seed).items()}


def built(probed: list[int], **options: Any) -> tuple[Any, Grass]:
    """A model and its optimizer, probed, if it has to be, with the batches of the parts `probed`."""
    chosen = {**COMMON, **options}
    model = llama(dtype=chosen.pop("dtype", torch.float32))
    if chosen.get("reprobe") is True:
        chosen["reprobe"] = lambda: [half(seed, part) for part in probed for seed in (50, 51)]
    opt = Grass(model, **chosen)
    if opt.needs_probe and not chosen.get("probe_steps"):
        opt.probe([half(seed, part) for part in probed for seed in (-1, -2)])
    return model, opt


def train_parts(model: Any, opt: Grass, parts: list[Any], first: int, last: int) -> list[float | None]:
    """Train, each batch taken in as many backward passes as there are `parts`; returns the norms before clipping."""
    norms = []
    count = opt.accumulation_steps
    for step in range(first, last):
        for seed in range(step * count, (step + 1) * count):
            for part in parts:
                (model(**half(seed, part)).loss / (count * len(parts))).backward()
        opt.step()
        opt.zero_grad()
        norms.append(opt.last_grad_norm)
    return norms


def outcome(model: Any, opt: Grass) -> dict[str, Any]:
    """Everything that must be the same on all ranks."""
    records = [asdict(record) for record in opt.history]
    for record in records:
        del record["exposed_copy_s"]  # a time
    return {"weights": weights(model), "records": records, "state": opt.state_dict()}


def run_case(name: str, parts: list[Any], probed: list[int]) -> dict[str, Any]:
    """One training run.

    Args:
        name: of `CASES`.
        parts: what this process takes of every batch: [rank], or [0, 1] for both halves one after the other, or
            [WHOLE] for both at once.
        probed: parts of the probe's batches.
    """
    model, opt = built(probed, **CASES[name])
    norms = train_parts(model, opt, parts, 0, STEPS)
    return {**outcome(model, opt), "norms": [norm for norm in norms if norm is not None]}


def case(name: str) -> Callable[[int], Any]:
    return lambda rank: run_case(name, [rank], [rank])


def exact_probe(batches: list[dict[str, Tensor]], accumulated: int) -> list[float]:
    opt = Grass(llama(), **{**COMMON, "accumulation_steps": accumulated})
    opt.probe(batches, exact=True)
    assert opt.importance is not None
    return opt.importance.values


def probed_exactly(rank: int) -> list[float]:
    return exact_probe([half(seed, rank) for seed in range(4)], 2)


RESUMED = (("probed in step", 2), ("probed in step", 5), ("reprobed", 4))
"""Cases, and the step after which they stop: while probing, and in mid-period."""


def resumed(rank: int) -> dict[str, Any]:
    """Both ranks go on from the state of rank 0."""
    found = {}
    for name, stop in RESUMED:
        model, opt = built([rank], **CASES[name])
        train_parts(model, opt, [rank], 0, stop)
        saved: list[Any] = [{"model": model.state_dict(), "opt": opt.state_dict()} if rank == 0 else None]
        dist.broadcast_object_list(saved, src=0)
        again, after = built([rank], **CASES[name])
        # what it did before loading must leave no trace
        train_parts(again, after, [rank], 20, 21)
        again.load_state_dict(saved[0]["model"])
        after.load_state_dict(saved[0]["opt"])
        train_parts(again, after, [rank], stop, STEPS)
        found[f"{name}, {stop}"] = outcome(again, after)
    return found


# ---------------------------------------------------------------- gradients that some ranks lack


class Forking(nn.Module):
    """A layer whose `sometimes` is used where asked for, and whose `never` is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.sometimes, self.never = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor, fork: bool) -> Tensor:
        x = x + self.always(x)
        return x + self.sometimes(x) if fork else x


class Forked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Forking() for _ in range(2))

    def forward(self, x: Tensor, fork: bool) -> Tensor:
        for layer in self.layers:
            x = layer(x, fork)
        return x


def forked(parts: list[int]) -> dict[str, Any]:
    """Only part 0 takes the fork."""
    torch.manual_seed(0)
    model = Forked()
    start = weights(model)
    opt = Grass(model, lr=1e-2, active_layers=2, sampler="uniform", weight_decay=0.5, layers=list(model.layers))
    for step in range(3):
        for part in parts:
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * step + part))
            (model(x, part == 0).square().mean() / len(parts)).backward()
        opt.step()
        opt.zero_grad()
    return {"start": start, "weights": weights(model)}
