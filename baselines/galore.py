"""GaLore: Adam in the top singular directions of every matrix's gradient (arXiv 2403.03507, ICML 2024).

Every `update_gap` steps P becomes the top-r singular vectors of the gradient G on its smaller side (`std` projection of
the authors' code: rows of V for G at least as tall as wide, columns of U otherwise). Adam runs on R = P^T G (or G P^T),
and W -= lr * scale * P N, where N is Adam's normalised step; so the learning rate of a matrix is lr * scale. Moments
are neither rotated nor reset when P changes (paper, algorithm 2, and code). All linear matrices of the decoder layers
are projected; embedding, head, norms and biases train with the recipe's AdamW (paper: attention and MLP are projected).

From the authors' code (jiaweizzhao/GaLore, galore_torch/adamw.py and galore_projector.py): the SVD in fp32, P kept in
the gradient's dtype, the decay of projected matrices applied after their update. Ours: moments in the recipe's state
dtype; epsilon is the recipe's and is added where torch's AdamW adds it, sqrt(v / (1 - beta2^t)) + eps, while the code
adds 1e-6 to sqrt(v). This is the variant that updates after backward: every full gradient is alive until the step ends,
so the recipe's accumulation and clipping apply; the layer-wise variant supports neither.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from baselines.matrices import adam_direction, matrices_of, project, rank_too_large, refuse_rank, update_before_step
from baselines.method import Expectation, Method, ModelFacts, Options, adamw, moment_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch import Tensor, nn

    from baselines.method import Recipe


class GaLoreOptions(Options):
    """GaLore's block in the config."""

    rank: int = Field(default=128, gt=0, description="r; transformers' default is 128, the paper's GLUE runs use 4")
    update_gap: int = Field(default=200, gt=0, description="T, steps between two singular value decompositions; code")
    scale: float = Field(default=0.25, gt=0, description="alpha; the code's default (the paper's GLUE runs use 4)")
    targets: tuple[str, ...] | None = Field(
        default=None, description="names of the modules to project; null takes every linear of the decoder layers"
    )


class GaLore(Method):
    """Everything trains; for the decoder layers' matrices, moments have only r dimensions on the smaller side."""

    Config = GaLoreOptions
    PAPER = "arXiv 2403.03507"
    EXAMPLES = ({"rank": 4, "update_gap": 5, "scale": 1.0}, {"rank": 2, "update_gap": 200})
    options: GaLoreOptions

    def skip(self, facts: ModelFacts) -> str | None:
        """A rank above a matrix's smaller side projects nothing."""
        return rank_too_large(self.options.rank, facts, self.options.targets)

    def attach(self, model: nn.Module) -> nn.Module:
        """One AdamW over everything; its step is preceded by the projected matrices' own update.

        Raises:
            ValueError: a target is no linear of the decoder layers, or a matrix is too small for the rank.
        """
        self.model = model.requires_grad_(True)
        self.matrices = matrices_of(model, self.options.targets)
        self.optimizer = adamw(list(model.parameters()), self.recipe, self.lr)
        project_gradients(
            self.optimizer,
            self.matrices,
            rank=self.options.rank,
            update_gap=self.options.update_gap,
            scale=self.options.scale,
        )
        return model

    def expect(self, facts: ModelFacts) -> Expectation:
        """Everything moves; moments of the projected matrices are r wide, their projections are state as well."""
        projected = sum(p.numel() for p in self.matrices)
        return Expectation(
            layers="all",
            embedding=True,
            head=True,
            final_norm=True,
            trainable_parameters=facts.total_parameters,
            state_of="constant",
            state_bytes=(facts.total_parameters - projected) * moment_bytes(self.recipe)
            + sum(projected_bytes(p, self.options.rank, self.recipe) for p in self.matrices),
        )


def projected_bytes(weight: nn.Parameter, rank: int, recipe: Recipe) -> int:
    """Bytes of a projected matrix's state: two moments of the larger side times r, and P in the weight's dtype."""
    small, large = sorted(weight.shape)
    return rank * (large * moment_bytes(recipe) + small * weight.element_size())


def project_gradients(
    optimizer: torch.optim.Optimizer, matrices: Iterable[nn.Parameter], *, rank: int, update_gap: int, scale: float
) -> None:
    """Make every `optimizer.step` begin with GaLore's update of those `matrices` that have a gradient.

    That update frees the matrix's gradient, so the step's own update skips it. `optimizer.state` holds the matrix's
    moments, its own step count and `projection`.

    Args:
        optimizer: `grass.adamw.AdamW`.
        matrices: two-dimensional parameters.
        rank: r.
        update_gap: steps between two projections, by the matrix's own count.
        scale: alpha.

    Raises:
        ValueError: a matrix is smaller than `rank` on its smaller side.
    """
    matrices = list(matrices)
    refuse_rank(rank, matrices)
    state_dtype: torch.dtype = optimizer.state_dtype  # type: ignore[attr-defined]

    def update(p: nn.Parameter, state: dict[str, Any], group: dict[str, Any]) -> None:
        assert p.grad is not None
        if not state or state["step"] % update_gap == 0:
            state["projection"] = top_singular_vectors(p.grad, rank)
        projected_update(p, state, group, scale=scale, state_dtype=state_dtype)

    update_before_step(optimizer, matrices, update)


def top_singular_vectors(gradient: Tensor, rank: int) -> Tensor:
    """P of a gradient (m, n): (rank, n) where m >= n, else (m, rank); in the gradient's dtype, from an SVD in fp32."""
    import torch

    u, _, vh = torch.linalg.svd(gradient.float(), full_matrices=False)
    vectors: Tensor = vh[:rank] if gradient.shape[0] >= gradient.shape[1] else u[:, :rank]
    # a copy: a view would keep all singular vectors alive
    return vectors.to(gradient.dtype, copy=True, memory_format=torch.contiguous_format)


def projected_update(
    weight: Tensor, state: dict[str, Any], group: dict[str, Any], *, scale: float, state_dtype: torch.dtype
) -> None:
    """One step of a matrix (m, n) by its gradient and `state["projection"]`; one full-size temporary."""
    assert weight.grad is not None
    projection = state["projection"]
    move = adam_direction(project(weight.grad, projection), state, group, state_dtype=state_dtype)
    back = projection.to(move.dtype)
    weight.add_(move @ back if weight.shape[0] >= weight.shape[1] else back @ move, alpha=scale)
    if group["weight_decay"] != 0:
        weight.mul_(1 - group["lr"] * group["weight_decay"])
