"""The probing phase: every layer's gradient norm, without an update and with little memory (paper, probing phase).

Each gradient's norm is computed in fp32 as soon as it appears, and the gradient is freed at once, so only one
parameter's gradient is alive at a time. Embedding, final norm and head are not differentiated. Decoder layers are
checkpointed during the probe (see `grass.backward`). The host reads the norms once, at the end.

With gradient accumulation, the measurement depends on the kind of probe. Outside the schedule, a probing step is one
micro-batch, whose gradient is noisier, hence larger, than the average over a step's micro-batches. Inside `step()`, it
is the root of the summed squares of the micro-batches' gradients as the loop scales them, which equals the accumulated
norm if micro-batches are uncorrelated. `exact` measures the norm of the accumulated gradient, at the cost of running
the micro-batches once for every `together` layers.

Data-parallel ranks are treated like micro-batches: a probe outside the schedule averages over the probing steps of all
ranks, inside `step()` the root is over the squares of all ranks, and `exact` averages the gradients themselves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from grass.backward import checkpointed
from grass.distributed import average, average_gradients, check_agreement, ranks
from grass.host import current
from grass.importance import gradient_square
from grass.layers import set_trainable

Loss = Callable[[nn.Module, Any], Tensor]
"""(model, batch) -> mean loss, a scalar."""

_in_step: WeakKeyDictionary[nn.Module, weakref.ref[Prober]] = WeakKeyDictionary()
"""By model: who measures its backward passes inside `step()`."""


def end_probe_in_step(model: nn.Module) -> None:
    """End the in-step probing of an earlier optimizer: its hooks would free the gradients of the next one.

    Deleting that optimizer does not remove them at once: it is part of a circle of references.
    """
    earlier = _in_step.pop(model, None)
    if earlier is not None and (prober := earlier()) is not None and prober.in_step is not None:
        prober.stop()


class Prober:
    """Measures the mean gradient norm m of every decoder layer.

    Args:
        model: model that computes the loss.
        layers: parameters of each decoder layer; none where the layer is frozen.
        everything: all parameters of the optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Sequence[nn.Parameter]],
        everything: Sequence[nn.Parameter],
    ) -> None:
        self._model = model
        self._layers = layers
        self._everything = everything
        # a layer without parameters to train has no gradient, and a norm of 0
        self._counts = [sum(p.numel() for p in parameters) or 1 for parameters in layers]
        self.loss: Loss | None = None
        """Loss of one batch; None: `model(**batch).loss`."""
        self._hooks = NormHooks(layers, everything)
        self.in_step: list[Tensor] | None = None
        """Squared norms of the in-step probing steps so far, each of shape (layers,); None outside in-step probing."""
        self._while_in_step = ExitStack()

    # ------------------------------------------------------------ outside the schedule

    def measure(self, batches: Iterable[Any], *, exact: int | None, together: int) -> list[float]:
        """Mean gradient norm m of every layer over `batches`; random number generators are restored afterwards.

        Args:
            batches: micro-batches.
            exact: micro-batches in one step, for the norm of the accumulated gradient; None: each is measured alone.
            together: layers whose accumulated gradients may be alive at once.

        Raises:
            ValueError: no batch, or gradients left over from an earlier backward pass.
            RuntimeError: ranks were given different numbers of batches.
        """
        losses = (self._loss_of(batch) for batch in batches)
        kept = random_numbers_kept(self._everything[0].device)
        with torch.enable_grad(), checkpointed(self._model), kept:
            if exact is None:
                squares = list(self._each(losses))
            else:
                squares = [self._accumulated(step, together) for step in self._steps(losses, exact)]
        self._agree("batches of the probe", len(squares))
        if not squares:
            raise ValueError("probe() was given no batch")
        means = self.means(squares)
        if ranks() > 1:
            means = current().numbers(average(torch.tensor(means, dtype=torch.float64, device=self._device)))
        return means

    def _steps(self, losses: Iterator[Callable[[], Tensor]], size: int) -> Iterator[list[Callable[[], Tensor]]]:
        """Yield the micro-batches of each exact probing step; equally many on all ranks, which average gradients."""
        while True:
            step = list(islice(losses, size))
            self._agree("micro-batches of an exact probing step", len(step))
            if not step:
                return
            yield step

    def _agree(self, what: str, number: int) -> None:
        check_agreement({what: number}, self._device, mend="give every rank as many")

    @property
    def _device(self) -> torch.device:
        return self._everything[0].device

    def _loss_of(self, batch: Any) -> Callable[[], Tensor]:
        return lambda: self.loss(self._model, batch) if self.loss is not None else self._model(**batch).loss

    def _each(self, losses: Iterable[Callable[[], Tensor]]) -> Iterator[Tensor]:
        self._hooks.start()
        try:
            for loss in losses:
                loss().backward()
                yield self._hooks.take()
        finally:
            self._hooks.stop()

    def _accumulated(self, losses: Sequence[Callable[[], Tensor]], together: int) -> Tensor:
        """Squared norms of the gradient accumulated over `losses`, each divided by their number."""
        squares = []
        for first in range(0, len(self._layers), together):
            chosen = self._layers[first : first + together]
            # dropout must be the same in every pass over the same micro-batches
            with _only(chosen, self._everything), random_numbers_kept(self._everything[0].device):
                for loss in losses:
                    (loss() / len(losses)).backward()
                average_gradients([p for parameters in chosen for p in parameters])
                squares += [gradient_square(parameters) for parameters in chosen]
        return torch.stack([torch.zeros((), device=self._everything[0].device) if s is None else s for s in squares])

    def means(self, squares: Sequence[Tensor]) -> list[float]:
        """Mean over probing steps of r = sqrt(||g||^2 / N); the host reads the device once."""
        rows, layers = torch.stack(list(squares)), len(self._layers)
        read = current().numbers(rows.reshape(-1))
        r = [
            [(read[step * layers + layer] / count) ** 0.5 for layer, count in enumerate(self._counts)]
            for step in range(len(squares))
        ]
        return [sum(row[layer] for row in r) / len(squares) for layer in range(layers)]

    # ------------------------------------------------------------ inside step()

    def start(self, before: Sequence[Tensor] = ()) -> None:
        """Start measuring backward passes; `before` holds the probing steps done before a resume."""
        self._hooks.start()
        self._while_in_step.enter_context(checkpointed(self._model))
        self.in_step = list(before)
        _in_step[self._model] = weakref.ref(self)

    def take(self) -> Tensor:
        """End one in-step probing step; returns r of every layer, shape (layers,), on the device."""
        assert self.in_step is not None
        # squares summed over ranks, each rank's gradient divided by the number of ranks, as in the averaged gradient
        self.in_step.append(average(self._hooks.take()) / ranks())
        return (self.in_step[-1] / torch.tensor(self._counts, device=self._everything[0].device)).sqrt()

    def stop(self) -> list[float] | None:
        """End in-step probing; returns m of every layer, or None if no probing step was done."""
        squares, self.in_step = self.in_step, None
        self._while_in_step.close()
        self._hooks.stop()
        return self.means(squares) if squares else None


class NormHooks:
    """From `start` to `stop`, reduces every gradient of the decoder layers to its squared norm and frees it."""

    def __init__(self, layers: Sequence[Sequence[nn.Parameter]], everything: Sequence[nn.Parameter]) -> None:
        self._layers = layers
        self._everything = everything
        self._squares: dict[int, Tensor] = {}
        self._before: list[tuple[nn.Parameter, bool]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def start(self) -> None:
        """Let only the decoder layers, and all of them, have gradients.

        Raises: ValueError: there are gradients left over from an earlier backward pass.
        """
        if any(p.grad is not None for p in self._everything):
            raise ValueError("probe() found gradients of an earlier backward pass: call opt.zero_grad() first")
        self._before = [(p, p.requires_grad) for p in self._everything]
        set_trainable(self._everything, False)
        for layer, parameters in enumerate(self._layers):
            set_trainable(parameters, True)
            self._handles += [p.register_post_accumulate_grad_hook(self._reduce(layer)) for p in parameters]

    def take(self) -> Tensor:
        """Sum of the squared gradient norms of every layer since the last call, shape (layers,), fp32, on the device.

        Over several backward passes, it is the sum of the squares of each pass. A layer without gradient has 0.
        """
        zero = torch.zeros((), dtype=torch.float32, device=self._everything[0].device)
        squares = torch.stack([self._squares.get(layer, zero) for layer in range(len(self._layers))])
        self._squares = {}
        return squares

    def stop(self) -> None:
        """Remove the hooks and restore every `requires_grad` flag."""
        for handle in self._handles:
            handle.remove()
        for parameter, trainable in self._before:
            set_trainable([parameter], trainable)
        self._handles, self._before, self._squares = [], [], {}

    def _reduce(self, layer: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            square = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()
            self._squares[layer] = self._squares[layer] + square if layer in self._squares else square
            parameter.grad = None

        return hook


@contextmanager
def _only(chosen: Sequence[Sequence[nn.Parameter]], everything: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let only `chosen` have gradients; none is left afterwards."""
    if any(p.grad is not None for p in everything):
        raise ValueError("probe() found gradients of an earlier backward pass: call opt.zero_grad() first")
    before = [(p, p.requires_grad) for p in everything]
    set_trainable(everything, False)
    for parameters in chosen:
        set_trainable(parameters, True)
    try:
        yield
    finally:
        for parameter, trainable in before:
            parameter.grad = None
            set_trainable([parameter], trainable)


@contextmanager
def random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Restore the global random number generators of the host and of `device` when the block ends."""
    devices = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield
