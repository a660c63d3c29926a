"""The observer probe: true gradient norms of every decoder layer, for every method, on fixed rows.

A method's trace has what the method believes of its layers; the observer measures the true values. It runs outside the
clock, leaves no gradient behind and draws no random number, so runs with and without it train the same weights bit for
bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from harness.step.loss import token_loss


class Observer:
    """Holds each decoder layer's own weights, taken before any method touched the model (adapters do not count)."""

    def __init__(self, layer_parameters: Sequence[Sequence[nn.Parameter]]) -> None:
        self.layer_parameters = [list(parameters) for parameters in layer_parameters]

    def observe(self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> tuple[list[float], float]:
        """Gradient of the mean loss per label token over all batches together.

        Returns:
            Root mean square of the gradient entries of each layer, and the loss (nats per label token).
        """
        own = [p for parameters in self.layer_parameters for p in parameters]
        everything = {id(p): p for p in [*model.parameters(), *own]}
        before = [(p, p.requires_grad, p.grad) for p in everything.values()]
        training = model.training
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        loss_sum = 0.0
        try:
            model.eval()
            for parameter, _, _ in before:
                parameter.requires_grad_(False)
                parameter.grad = None
            for parameter in own:
                parameter.requires_grad_(True)
            for batch in batches:
                loss = token_loss(model, batch) / tokens
                loss.backward()  # type: ignore[no-untyped-call]
                loss_sum += float(loss.detach())
            return [_rms(parameters) for parameters in self.layer_parameters], loss_sum
        finally:
            for parameter, trainable, gradient in before:
                parameter.requires_grad_(trainable)
                parameter.grad = gradient
            model.train(training)


def _rms(parameters: Sequence[nn.Parameter]) -> float:
    square = sum(float(p.grad.to(torch.float64).square().sum()) for p in parameters if p.grad is not None)
    return math.sqrt(square / sum(p.numel() for p in parameters))
