"""What ranks of GRASS are told where they do not agree, and where something else shards or wraps the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from grass_rank_runs import COMMON, built, half, train_parts
from grass_tiny import llama
from torch import nn

from grass import Grass
from grass import distributed as under_test


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
