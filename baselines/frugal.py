"""Layers drawn uniformly train by AdamW, all others by signSGD: the cheap control against sampling at all.

After FRUGAL (arXiv 2411.07837, code fzmushko/FRUGAL), which splits the weights into a part with state and a part
without, moves the latter by the sign of its gradient, and resets the state where the split changes; its block-wise
choice takes whole blocks. The rate of the part without state is a tenth of the other's, as in FRUGAL's fine-tuning.

Ours, so that a comparison with `lisa` shows what moving the other layers does and nothing else: layers are drawn as
LISA draws them, in the same order under the same seed, and embedding, final norm and head always have state. All
gradients are clipped by their global norm, which signSGD does not feel. The recipe's weight decay is for both parts.
signSGD's step is computed in fp32, and where weights are bf16 it is always rounded stochastically: a step of 1e-6 is
far below half the distance of bf16 numbers, so that rounding to nearest would leave the layers frozen. State is that of
`lisa`, but every layer has a gradient, and all of them are alive until the step ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from baselines.lisa import Lisa, LisaOptions
from baselines.method import Expectation, ModelFacts

if TYPE_CHECKING:
    from torch import Tensor, nn


class FrugalOptions(LisaOptions):
    """The control's block in the config: LISA's, and the rate of signSGD."""

    state: Literal["reset"] = "reset"
    sign_lr_ratio: float = Field(default=0.1, gt=0, description="signSGD's rate over AdamW's; FRUGAL's fine-tuning")


class Frugal(Lisa):
    """LISA whose sleeping layers move by signSGD."""

    Config = FrugalOptions
    PAPER = "arXiv 2411.07837"
    EXAMPLES = (
        {"active_layers": 2, "sample_every": 3},
        {"active_layers": 1, "sample_every": 4, "train_embedding": False, "train_head": False, "sign_lr_ratio": 0.5},
    )
    options: FrugalOptions

    def skip(self, facts: ModelFacts) -> str | None:
        """As LISA; skip layers of different sizes as well."""
        smallest, largest = min(facts.layer_parameters), max(facts.layer_parameters)
        if largest > 1.01 * smallest:
            return (
                f"layers of different sizes, {smallest:,} to {largest:,} parameters: state is promised to be constant"
            )
        return super().skip(facts)

    def attach(self, model: nn.Module) -> nn.Module:
        """As LISA; every step of the optimizer begins with signSGD of the layers that are not drawn."""
        from grass.adamw import Rounding

        super().attach(model)
        assert self.optimizer is not None
        self.numbers = {p: number for number, p in enumerate(model.parameters())}
        self.rounding = Rounding(self.seed)
        self.optimizer.register_step_pre_hook(lambda optimizer, *_: self._sign_steps(optimizer))
        return model

    def begin_step(self, step: int) -> None:
        """Draw as LISA; the random bits of rounding are this step's."""
        self.step = step
        super().begin_step(step)

    def expect(self, facts: ModelFacts) -> Expectation:
        """All layers move and have gradients; state exists for the drawn ones and outside the layers."""
        promise = super().expect(facts)
        outside = facts.outside_parameters(
            embedding=promise.embedding, head=promise.head, final_norm=promise.final_norm
        )
        drawn = self.options.active_layers * max(promise.state_bytes_of_layers(facts))
        return replace(
            promise,
            layers="all",
            active_layers=None,
            trainable_parameters=sum(facts.layer_parameters) + outside,
            state_of="constant",
            state_bytes=drawn + promise.state_bytes_outside(facts),
        )

    def _freeze(self) -> None:
        """Nothing sleeps; the draw alone decides which update a layer gets."""

    def _sign_steps(self, optimizer: Any) -> None:
        """Move the layers that are not drawn, and free their gradients, so that AdamW leaves them alone."""
        import torch

        (group,) = optimizer.param_groups
        lr = group["lr"] * self.options.sign_lr_ratio
        with torch.no_grad():
            for layer, parameters in enumerate(self.layer_parameters):
                for parameter in parameters:
                    if layer not in self.active and parameter.grad is not None:
                        for weight, gradient, start in _pieces(parameter):
                            self._move(weight, gradient, (self.numbers[parameter], start), lr, group["weight_decay"])
                        parameter.grad = None

    def _move(self, weight: Tensor, gradient: Tensor, place: tuple[int, int], lr: float, weight_decay: float) -> None:
        import torch

        from grass.rounding import round_stochastically

        exact = weight.float()  # the weight itself if it is fp32
        exact.mul_(1 - lr * weight_decay).sub_(gradient.sign(), alpha=lr)
        if weight.dtype == torch.bfloat16:
            number, start = place
            bits = self.rounding.generator(weight.device, parameter=number, step=self.step, start=start)
            round_stochastically(exact, weight, bits)


def _pieces(parameter: nn.Parameter) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Views of a parameter and its gradient, piece by piece, so that temporaries are small; and where each starts."""
    from grass.adamw import flat, pieces_of

    assert parameter.grad is not None
    if not parameter.is_contiguous():
        yield parameter, parameter.grad, 0
        return
    weight, gradient = flat(parameter), flat(parameter.grad)
    for start, end in pieces_of(parameter, parameter.dtype):
        yield weight[start:end], gradient[start:end], start
