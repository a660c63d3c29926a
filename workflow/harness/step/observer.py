"""The observer probe: true gradient norms of every decoder layer, for every method, on fixed rows.

A method's trace has what the method believes of its layers; the observer measures the true values, as GRASS's own probe
does (`grass.probing`): the mean over batches of each batch's root mean square. Every gradient is reduced to its norm as
it appears, decoder layers are recomputed in backward, and the head is applied to a few tokens at a time, so that the
observer needs less memory than a step of any method. It computes in the weights' own dtype, as validation does (see
`harness.training.validation`). It runs outside the clock, leaves no gradient behind and draws no random number, so runs
with and without it train the same weights bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from baselines.method import host_number
from grass.layers import LayerMap
from grass.probing import Prober
from harness.step.loss import chunked_token_loss, label_tokens, logits_are_plain, token_loss


class Observer:
    """Holds each decoder layer's own weights, taken before any method touched the model (adapters do not count)."""

    def __init__(self, layers: LayerMap) -> None:
        self._layers = list(layers.layers)
        self._own = [list(parameters) for parameters in layers.layer_parameters()]

    def observe(self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> tuple[list[float], float]:
        """Gradients of the mean loss per label token of each batch.

        Returns:
            For each layer, the mean over batches of the root mean square of its gradient's entries; and the mean loss
            of all batches together (nats per label token).
        """
        own = [p for parameters in self._own for p in parameters]
        everything = list({id(p): p for p in [*model.parameters(), *own]}.values())
        before = [(p, p.grad) for p in everything]
        training = model.training
        losses: list[Tensor] = []

        def mean_loss(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
            loss = (chunked_token_loss if plain else token_loss)(module, batch)
            losses.append(loss.detach())
            return loss / label_tokens(batch)

        prober = Prober(model, self._own, everything)
        prober.loss = mean_loss
        try:
            model.eval()
            plain = logits_are_plain(model, batches[0])
            for parameter in everything:
                parameter.grad = None
            with _recomputed(self._layers):
                rms = prober.measure(batches, exact=None, together=1)
        finally:
            for parameter, gradient in before:
                parameter.grad = gradient
            model.train(training)
        return rms, host_number(torch.stack(losses).sum()) / sum(label_tokens(batch) for batch in batches)


@contextmanager
def _recomputed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Keep only the inputs of `layers` for backward, in evaluation mode too, where transformers would not."""
    before = [(layer, vars(layer).get("forward")) for layer in layers]
    for layer, _ in before:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer, forward in before:
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward  # type: ignore[method-assign]
