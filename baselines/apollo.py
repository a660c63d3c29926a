"""APOLLO and APOLLO-Mini: gradients scaled as Adam would in a random subspace (arXiv 2412.05270, MLSys 2025).

Adam moments are kept only for a random projection R of a matrix's gradient G to rank r. They give Adam's normalised
step N in that subspace, and s = ||N|| / ||R|| estimates how Adam scales each channel (`channel`: rows of G if it is at
least as tall as wide, columns otherwise) or the whole matrix (`tensor`, Mini with r = 1). The step is lr * sqrt(scale)
* s * G. This applies to all linear matrices of the decoder layers; the rest trains with the recipe's AdamW.

    APOLLO        rank 256, scale_type channel, scale 1    (the authors' pre-training runs)
    APOLLO-Mini   rank 1,   scale_type tensor,  scale 128
    fine-tuning   rank 128, scale_type channel, scale 32   (LLaMA-Factory's example: 4096 / 128)

From the paper (algorithm 1): entries of the projection are N(0, 1/r); a seed is stored, not the projection. So every
step regenerates the projection from its seed, and a new one is drawn every `update_gap` steps. From the authors' code
(zhuhanqing/APOLLO, apollo_torch/apollo.py), which keeps the projection: `scale` enters as its square root; the norm of
the scaled gradient, before bias correction and before sqrt(scale), may grow by a factor of 1.01 at most from step to
step; 1e-8 is added to ||R||; decay comes last. Ours: seeds, derived from the run's seed, the matrix and the number of
the draw; moments in the recipe's state dtype; the recipe's epsilon where torch has it, sqrt(v / (1 - beta2^t)) + eps,
while the code adds 1e-6 to sqrt(v).

The full gradient of every matrix is alive until the step ends, so the recipe's accumulation and clipping apply.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from baselines.matrices import adam_direction, matrices_of, project, rank_too_large, refuse_rank, update_before_step
from baselines.method import Expectation, Method, ModelFacts, Options, adamw, moment_bytes, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor, nn

NORM_GROWTH = 1.01
"""Largest growth of a scaled gradient's norm from one step to the next (code; taken there from Fira, 2410.01623)."""


class ApolloOptions(Options):
    """APOLLO's block in the config."""

    rank: int = Field(default=256, gt=0, description="r; the code's default for APOLLO, 1 for APOLLO-Mini")
    scale_type: Literal["channel", "tensor"] = Field(default="channel", description="channel: APOLLO; tensor: Mini")
    scale: float = Field(default=1.0, gt=0, description="enters as its square root; 1 for APOLLO, 128 for Mini (code)")
    update_gap: int = Field(default=200, gt=0, description="T, steps between two random projections (paper, code)")
    targets: tuple[str, ...] | None = Field(
        default=None, description="names of the modules to project; null takes every linear of the decoder layers"
    )


class Apollo(Method):
    """Everything trains; matrices of the decoder layers use gradients scaled by a low-rank Adam."""

    Config = ApolloOptions
    PAPER = "arXiv 2412.05270"
    EXAMPLES = (
        {"rank": 4, "update_gap": 5},
        {"rank": 1, "scale_type": "tensor", "scale": 16.0, "update_gap": 200},
    )
    options: ApolloOptions

    def skip(self, facts: ModelFacts) -> str | None:
        """A rank above a matrix's smaller side projects nothing."""
        return rank_too_large(self.options.rank, facts, self.options.targets)

    def attach(self, model: nn.Module) -> nn.Module:
        """One AdamW over everything; its step is preceded by the matrices' own update.

        Raises:
            ValueError: a target is no linear of the decoder layers, or a matrix is too small for the rank.
        """
        from grass.adamw import Rounding

        self.model = model.requires_grad_(True)
        matrices = matrices_of(model, self.options.targets)
        refuse_rank(self.options.rank, matrices)
        self.numbers = {p: number for number, p in enumerate(matrices)}
        # reused for projections: random bits that depend only on the seed, the matrix and a count
        self.bits = Rounding(self.seed)
        self.optimizer = adamw(list(model.parameters()), self.recipe, self.lr)
        update_before_step(self.optimizer, matrices, self._update)
        return model

    def projection(self, weight: Tensor, draw: int) -> Tensor:
        """The random projection of a matrix (m, n): (rank, n) where m >= n, else (m, rank); the gradient's dtype.

        Args:
            weight: one of the projected matrices.
            draw: number of projections the matrix had before.
        """
        import torch

        rows, columns = weight.shape
        shape = (self.options.rank, columns) if rows >= columns else (rows, self.options.rank)
        number = self.numbers[weight]  # type: ignore[index]
        generator = self.bits.generator(weight.device, parameter=number, step=draw, start=0)
        drawn: Tensor = torch.randn(shape, generator=generator, device=weight.device)
        return drawn.div_(self.options.rank**0.5).to(weight.dtype)

    def expect(self, facts: ModelFacts) -> Expectation:
        """Everything moves; a matrix's state is two moments of its larger side times r, and one norm in fp32."""
        projected = sum(p.numel() for p in self.numbers)
        low = sum(self.options.rank * max(p.shape) for p in self.numbers)
        return Expectation(
            layers="all",
            embedding=True,
            head=True,
            final_norm=True,
            trainable_parameters=facts.total_parameters,
            state_of="constant",
            state_bytes=(facts.total_parameters - projected + low) * moment_bytes(self.recipe) + 4 * len(self.numbers),
        )

    def _update(self, weight: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """One step of a matrix (m, n); temporaries of its full size in fp32."""
        import torch

        assert weight.grad is not None
        state_dtype = torch_dtype(self.recipe.state_dtype)
        low = project(weight.grad, self.projection(weight, state.get("step", 0) // self.options.update_gap))
        unit = {**group, "lr": 1.0}
        move = adam_direction(low, state, unit, state_dtype=state_dtype).float()
        beta1, beta2 = group["betas"]
        correction = (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
        scaled = weight.grad.float() * (_norm(move, self._channels(weight)) / correction).div_(
            _norm(low.float(), self._channels(weight)) + 1e-8
        )
        norm = torch.linalg.vector_norm(scaled)
        before = state.get("update_norm", torch.full_like(norm, torch.inf))
        excess = (norm / (before + 1e-8)).clamp_min(NORM_GROWTH) / NORM_GROWTH
        state["update_norm"] = norm / excess
        weight.add_(scaled.div_(excess), alpha=-group["lr"] * correction * self.options.scale**0.5)
        if group["weight_decay"] != 0:
            weight.mul_(1 - group["lr"] * group["weight_decay"])

    def _channels(self, weight: Tensor) -> int | None:
        """Dimension over which a channel's norm is taken; None for the norm of the whole matrix."""
        if self.options.scale_type == "tensor":
            return None
        return 1 if weight.shape[0] >= weight.shape[1] else 0


def _norm(low: Tensor, dim: int | None) -> Tensor:
    import torch

    norm: Tensor = torch.linalg.vector_norm(low, dim=dim, keepdim=dim is not None)
    return norm
