"""What the processes of `test_distributed.py` do; a script: `python grass_ranks.py <folder>`.

Every scenario returns what its rank saw, which is saved as `<folder>/<scenario>-<rank>.pt`. `run_case` is also what the
test itself runs in one process, for comparison.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from grass_tiny import batch, llama, weights
from rank_scripts import exit_code
from torch import Tensor, nn

from grass import Grass
from grass import distributed as under_test

TIMEOUT_S = 60
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


# ---------------------------------------------------------------- refusals


def refused(attempt: Callable[[], Any], error: type[Exception]) -> str | None:
    try:
        attempt()
    except error as refusal:
        return str(refusal)
    return None


def norms_frozen(layers: int) -> Any:
    """A model whose lowest `layers` layers keep their first norm as it is."""
    model = llama()
    for layer in model.model.layers[:layers]:
        layer.input_layernorm.requires_grad_(False)
    return model


def disagreements(rank: int) -> dict[str, str | None]:
    """What each rank is told where rank 1 does something else than rank 0."""

    def uniform(**options: Any) -> tuple[Any, Grass]:
        return built([rank], **{"sampler": "uniform", **options})

    def differently(**options: Any) -> str | None:
        return refused(lambda: uniform(**options), RuntimeError)

    def stepping(change: Callable[[Any, Grass], None], *, after: int = 0) -> str | None:
        model, opt = uniform()
        train_parts(model, opt, [rank], 0, after)
        if rank:
            change(model, opt)
        else:
            opt.load_state_dict(opt.state_dict())
        return refused(lambda: train_parts(model, opt, [rank], after, 4), RuntimeError)

    def spoil(model: Any, opt: Grass) -> None:
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1e-6

    def other_rate(model: Any, opt: Grass) -> None:
        opt.param_groups[-1]["lr"] = 3e-3

    def other_state(model: Any, opt: Grass) -> None:
        state = opt.state_dict()
        state["grass"]["steps"] = 3
        opt.load_state_dict(state)

    def probe(count: int, *, exact: bool = False) -> str | None:
        opt = Grass(llama(), **{**COMMON, "accumulation_steps": 2 if exact else 1})
        batches = [half(seed, rank) for seed in range(count)]
        return refused(lambda: opt.probe(batches, exact=exact), RuntimeError)

    def asking(values: dict[str, int]) -> str | None:
        return refused(lambda: under_test.check_agreement(values, torch.device("cpu"), mend="ask alike"), RuntimeError)

    return {
        "what is compared": asking([{"steps": 0}, {"batches": 2, "micro-batches": 1}][rank]),
        "seed": differently(seed=rank),
        "temperature": differently(temperature=0.2 + rank),
        "target": differently(temperature="auto", target=0.6 + rank / 4),
        "active_layers": differently(active_layers=2 + rank),
        "sampler": refused(lambda: built([rank], sampler=["importance", "uniform"][rank]), RuntimeError),
        "reprobe": differently(reprobe=bool(rank)),
        "frozen": refused(lambda: Grass(norms_frozen(rank), **COMMON, sampler="fixed"), RuntimeError),
        "trained groups": differently(train_head=not rank),
        "model": refused(lambda: Grass(llama(layers=4 + rank), **COMMON, sampler="uniform"), RuntimeError),
        "weights": stepping(spoil),
        "learning rate": stepping(other_rate),
        "state": stepping(other_state, after=1),
        "batches": probe(2 + rank),
        "no batch": probe(rank),
        "exact batches": probe(4 - rank, exact=True),
        "exact steps": probe(4 - 2 * rank, exact=True),
        "nothing": differently(offload=["move", "resident"][rank], accumulation_steps=1 + rank),
    }


def wrapped(rank: int) -> dict[str, str | None]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    sharded = llama()
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    return {
        "DistributedDataParallel": refused(lambda: Grass(DistributedDataParallel(llama()), **COMMON), ValueError),
        "fully_shard": refused(lambda: Grass(sharded, **COMMON), ValueError),
    }


def toggled_under_ddp(rank: int) -> dict[str, dict[str, Any]]:
    """DistributedDataParallel is built with one layer frozen; after two steps the other one is, in its place."""
    return {
        f"{toggle=}, {beside=}, {find_unused=}": _under_ddp(rank, toggle, beside, find_unused)
        for toggle in (False, True)
        for beside in (False, True)
        for find_unused in (False, True)
    }


def _under_ddp(rank: int, toggle: bool, beside: bool, find_unused: bool) -> dict[str, Any]:
    """`beside`: something trains all the time, as the head does beside decoder layers."""
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    layers, head = [nn.Linear(3, 3), nn.Linear(3, 3)], nn.Linear(3, 3)
    layers[1].requires_grad_(False)
    head.requires_grad_(beside)
    parallel = DistributedDataParallel(nn.Sequential(*layers, head), find_unused_parameters=find_unused)
    sgd = torch.optim.SGD(parallel.parameters(), lr=0.1)

    def train() -> None:
        for step in range(4):
            trained = int(toggle and step >= 2)
            layers[trained].requires_grad_(True)
            layers[1 - trained].requires_grad_(False)
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * step + rank))
            parallel(x).square().mean().backward()
            sgd.step()
            sgd.zero_grad()

    return {"error": refused(train, RuntimeError), "weights": [p.detach().clone() for p in parallel.parameters()]}


# ---------------------------------------------------------------- collectives


@contextmanager
def counted() -> Iterator[list[tuple[torch.dtype, int]]]:
    """Dtype and bytes of every tensor that is all-reduced."""
    calls: list[tuple[torch.dtype, int]] = []
    plain = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **options: Any) -> Any:
        calls.append((tensor.dtype, tensor.nbytes))
        return plain(tensor, *args, **options)

    dist.all_reduce = all_reduce
    try:
        yield calls
    finally:
        dist.all_reduce = plain


def traffic(rank: int) -> dict[str, Any]:
    """What one step in mid-period reduces, after one backward pass and after three."""
    found = {}
    for count in (1, 3):
        model, opt = built([rank], accumulation_steps=count)
        train_parts(model, opt, [rank], 0, 1)
        for seed in range(count):
            model(**half(seed, rank)).loss.backward()
        outside = {"embedding": model.model.embed_tokens, "norm": model.model.norm, "head": model.lm_head}
        awake = [p for part in outside.values() for p in part.parameters()]
        awake += [p for layer in opt.active for p in opt.layer_parameters[layer]]
        with counted() as calls:
            opt.step()
        found[f"{count} backward passes"] = {
            "calls": calls,
            "awake": sum(p.nbytes for p in awake),
            "tensors": len(awake),
            "model": sum(p.nbytes for p in model.parameters()),
        }
    return found


SIZES = (1, 5, 60, 64, 65, 1, 130, 3, 64, 7)
"""Entries of the gradients of `mixed_gradients`; a bucket has 64 fp32 or 128 bf16 entries."""


def mixed_gradients(rank: int) -> list[Tensor]:
    """Of two dtypes in turn, some stored column by column, one of a slice."""
    generator = torch.Generator().manual_seed(rank)
    found = []
    for number, size in enumerate(SIZES):
        dtype = torch.bfloat16 if number % 2 else torch.float32
        found.append(torch.randn(size, generator=generator).to(dtype))
    found.append(torch.randn(8, 6, generator=generator).t())
    found.append(torch.randn(40, 40, generator=generator).t())
    found.append(torch.randn(6, 6, generator=generator)[:, ::2])
    return found


def averaged_gradients(rank: int) -> dict[str, Any]:
    under_test.BUCKET_BYTES = 256
    gradients = mixed_gradients(rank)
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    with counted() as calls:
        under_test.average_gradients(parameters)
    # in place: a gradient that is a view of something stays one
    assert all(p.grad is g for p, g in zip(parameters, gradients, strict=True))
    return {"gradients": [g.clone() for g in gradients], "calls": calls}


def averages(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    dtypes = (torch.float32, torch.float64)
    return [
        under_test.average(torch.randn(size, generator=generator).to(dtype) * 10 ** (3 * rank))
        for size in (1, 2, 3, 4, 33, 1000, 100003)
        for dtype in dtypes
    ]


SCENARIOS: dict[int, dict[str, Callable[[int], Any]]] = {
    2: {
        **{name: case(name) for name in CASES},
        "probed exactly": probed_exactly,
        "resumed": resumed,
        "forked": lambda rank: forked([rank]),
        "disagreements": disagreements,
        "wrapped": wrapped,
        "toggled under ddp": toggled_under_ddp,
        "traffic": traffic,
    },
    3: {"averaged gradients": averaged_gradients, "averages": averages},
}
"""By the number of ranks. With three, the order of a sum shows in its last bits."""


def be_rank(rank: int, ranks: int, folder: Path) -> None:
    # a hang ends with a traceback of where it hung
    faulthandler.dump_traceback_later(TIMEOUT_S, exit=True)
    store = dist.FileStore(str(folder / f"store of {ranks}"), ranks)
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
    for name, scenario in SCENARIOS[ranks].items():
        torch.save(scenario(rank), folder / f"{name}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main(folder: Path) -> int:
    # imported once, here, for all ranks; forking is safe as long as this process has computed nothing
    from transformers import LlamaForCausalLM  # noqa: F401

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=be_rank, args=(rank, ranks, folder), daemon=True)
        for ranks in SCENARIOS
        for rank in range(ranks)
    ]
    return exit_code(processes)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
