"""Loops around the packages of the methods' authors, and around 8-bit optimizers; each may be missing."""

from __future__ import annotations

import io
import warnings
from contextlib import redirect_stdout
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from grass.layers import find_layers
from harness.efficiency.arithmetic import PERIOD
from harness.efficiency.peers.contenders import LR, Bench, Loop

LOW_RANK = {"rank": 64, "update_gap": 200}
"""Of GaLore and APOLLO."""


def badam(bench: Bench, *, clip: float | None) -> Loop:
    """`badam`, its blocks in ascending order."""
    from badam import BlockOptimizer

    model = bench.model()
    base = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        optimizer = BlockOptimizer(
            base, list(model.named_parameters()), switch_block_every=PERIOD, switch_mode="ascending",
            include_embedding=False, include_lm_head=False,
        )  # fmt: skip
    return Loop(bench, model, _Quiet(optimizer), clip=clip)


class _Quiet:
    """An optimizer whose prints are not wanted; they are few."""

    def __init__(self, optimizer: Any) -> None:
        self.state, self._optimizer = optimizer.state, optimizer

    def step(self) -> None:
        with redirect_stdout(io.StringIO()):
            self._optimizer.step()


def galore(bench: Bench, *, clip: float | None) -> Loop:
    """`galore-torch` on every matrix of the decoder layers."""
    from galore_torch import GaLoreAdamW

    model = bench.model()
    matrices, others = _split(model)
    low = {"rank": LOW_RANK["rank"], "update_proj_gap": LOW_RANK["update_gap"], "scale": 0.25, "proj_type": "std"}
    groups = [{"params": others}, {"params": matrices, **low}]
    return Loop(bench, model, GaLoreAdamW(groups, lr=LR, no_deprecation_warning=True), clip=clip)


def apollo(bench: Bench, *, clip: float | None) -> Loop:
    """`apollo-torch` on every matrix of the decoder layers."""
    from apollo_torch import APOLLOAdamW

    model = bench.model()
    matrices, others = _split(model)
    low = {
        "rank": LOW_RANK["rank"], "update_proj_gap": LOW_RANK["update_gap"], "scale": 1.0, "scale_type": "channel",
        "proj": "random", "proj_type": "std",
    }  # fmt: skip
    groups = [{"params": matrices, **low}, {"params": others}]
    return Loop(bench, model, APOLLOAdamW(groups, lr=LR), clip=clip)


def adalomo(bench: Bench, *, clip: float | None) -> Loop:
    """`lomo-optim`'s AdaLomo, which updates in backward."""
    from lomo_optim import AdaLomo

    model = bench.model()
    # the package puts its states on a GPU, wherever the model is
    with patch.object(torch.Tensor, "cuda", lambda tensor: tensor.to(bench.device)):
        package = AdaLomo(model, lr=LR, loss_scale=None)
    return _InBackward(bench, model, package, clip=clip)


class _InBackward(Loop):
    """A loop whose optimizer runs backward itself and updates in it."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.update = None

    def step(self, number: int) -> None:
        self._optimizer.fused_backward(self.loss(number), LR)


def bitsandbytes_8bit(bench: Bench, *, clip: float | None) -> Loop:
    """`bitsandbytes`' AdamW8bit over all parameters."""
    from bitsandbytes.optim import AdamW8bit

    model = bench.model()
    return Loop(bench, model, AdamW8bit(model.parameters(), lr=LR, weight_decay=0.0), clip=clip)


def torchao_8bit(bench: Bench, *, clip: float | None) -> Loop:
    """`torchao`'s AdamW8bit over all parameters."""
    from torchao.optim import AdamW8bit

    model = bench.model()
    return Loop(bench, model, AdamW8bit(model.parameters(), lr=LR, weight_decay=0.0), clip=clip)


def _split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices of the decoder layers, and everything else."""
    layers = find_layers(model).layers
    matrices = [p for layer in layers for p in layer.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    return matrices, [p for p in model.parameters() if id(p) not in chosen]
