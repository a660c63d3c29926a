"""A plain stack of decoder layers, without embedding or head, for what is measured on the host."""

from __future__ import annotations

import warnings
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from grass.optimizer import Grass


class Layer(nn.Module):
    """A decoder layer of 12 width^2 + 2 width parameters: attention and a feed-forward part, each after a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shape (batch, tokens, width) in and out."""
        normed = self.before(x)
        q, k, v = (self._heads(part(normed)) for part in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        fed: Tensor = self.down(F.gelu(self.up(self.between(x))))
        return x + fed

    def _heads(self, x: Tensor) -> Tensor:
        split: Tensor = x.unflatten(2, (self.heads, -1))
        return split.transpose(1, 2)


class Stack(nn.Module):
    """Decoder layers, one on the other."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Mean square of what the top layer gives: a loss, whatever it may mean."""
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """The loss that probing and training share."""
    loss: Tensor = model(batch)
    return loss


def grass_on(model: Stack, batch: Tensor, **options: Any) -> Grass:
    """A `Grass` over all of `model`, probed with `batch` if its sampler needs that."""
    opt = Grass(model, lr=1e-5, layers=list(model.layers), **options)
    if opt.needs_probe:
        with warnings.catch_warnings():
            # random layers matter alike, and GRASS says so
            warnings.filterwarnings("ignore", message="GRASS ")
            opt.probe([batch], loss_of)
    return opt
