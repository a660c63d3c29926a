"""GaLore: Adam in the top singular directions of every matrix's gradient (arXiv 2403.03507, ICML 2024).

Every `update_gap` steps P becomes the top-r singular vectors of the gradient G on its smaller side (`std` projection
of the authors' code: rows of V for G at least as tall as wide, columns of U otherwise). R = P^T G (or G P^T) is what
Adam sees, and W -= lr * scale * P N, N being Adam's normalised step; so the rate of a matrix is lr * scale. Moments
are neither rotated nor reset when P changes (paper, algorithm 2, and code). All linear matrices of the decoder layers
are projected; embedding, head, norms and biases train with the recipe's AdamW (paper: attention and MLP are
projected).

From the authors' code (jiaweizzhao/GaLore, galore_torch/adamw.py and galore_projector.py): the SVD in fp32, P kept in
the gradient's dtype, the decay of projected matrices applied after their update. Ours: moments in the recipe's state
dtype; epsilon is the recipe's and stands where torch's AdamW has it, sqrt(v / (1 - beta2^t)) + eps, while the code
adds 1e-6 to sqrt(v). This is the variant that updates after backward: every full gradient is alive until the step
ends, so accumulation and clipping are the recipe's; the layer-wise variant can do neither.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pydantic import Field

from baselines.method import Expectation, Method, ModelFacts, Options, adamw, moment_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

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
    """Everything trains; moments of the decoder layers' matrices live in r dimensions of their smaller side."""

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


def linears_of(model: nn.Module, targets: Sequence[str] | None = None) -> list[dict[str, nn.Module]]:
    """Linear modules (`nn.Linear`, GPT-2's `Conv1D`) of each decoder layer, bottom first, by the name of their weight.

    Args:
        model: a causal language model.
        targets: last parts of the modules' names to take; None takes all.

    Raises:
        ValueError: a target that is the name of no linear in the decoder layers.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from grass.layers import find_layers

    names = {id(module): name for name, module in model.named_modules()}
    found = [
        {names[id(m)]: m for m in layer.modules() if isinstance(m, nn.Linear | Conv1D)}
        for layer in find_layers(model).layers
    ]
    everything = {name for layer in found for name in layer}
    for target in targets or ():
        if not any(is_target(name, [target]) for name in everything):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in everything}))
            raise ValueError(f"targets: {target!r} is no linear module of the decoder layers; there are: {known}")
    return [{f"{name}.weight": m for name, m in layer.items() if is_target(name, targets)} for layer in found]


def is_target(name: str, targets: Sequence[str] | None) -> bool:
    """Whether the module `name` is among `targets`, which name the last parts of modules; None takes all."""
    return targets is None or any(name == target or name.endswith(f".{target}") for target in targets)


def matrices_of(model: nn.Module, targets: Sequence[str] | None = None) -> list[nn.Parameter]:
    """Weights of `linears_of`, bottom first."""
    weights: list[Any] = [m.weight for layer in linears_of(model, targets) for m in layer.values()]
    return weights


def rank_too_large(rank: int, facts: ModelFacts, targets: Sequence[str] | None = None) -> str | None:
    """Reason to skip where a target matrix is smaller than `rank` on its smaller side, or None.

    Facts hold sizes, no shapes: one side of a decoder layer's matrix is taken to be the model's width. Where neither is
    (a factored projection), `project_gradients` still refuses.
    """
    width = facts.hidden_size
    for name, size in facts.tensor_parameters.items():
        module, _, kind = name.rpartition(".")
        # a vector as long as the width is a norm's weight
        in_layer = kind == "weight" and size > width and re.search(r"\.\d+\.", name)
        if in_layer and is_target(module, targets) and min(width, size // width) < rank:
            return f"rank {rank} is above the smaller side of {name}, {min(width, size // width)}"
    return None


def projected_bytes(weight: nn.Parameter, rank: int, recipe: Recipe) -> int:
    """Bytes of a projected matrix's state: two moments of the larger side times r, and P in the weight's dtype."""
    small, large = sorted(weight.shape)
    return rank * (large * moment_bytes(recipe) + small * weight.element_size())


def project_gradients(
    optimizer: torch.optim.Optimizer, matrices: Iterable[nn.Parameter], *, rank: int, update_gap: int, scale: float
) -> None:
    """Let every `optimizer.step` begin with GaLore's update of those `matrices` that have a gradient.

    A matrix that was updated has no gradient any more when the step's own update comes, and keeps in `optimizer.state`
    its moments, its own step count and `projection`.

    Args:
        optimizer: `grass.adamw.AdamW`.
        matrices: of two dimensions.
        rank: r.
        update_gap: steps of a matrix's own count between two projections.
        scale: alpha.

    Raises:
        ValueError: a matrix is smaller than `rank` on its smaller side.
    """
    import torch

    chosen = {id(p) for p in matrices}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) in chosen and rank > min(p.shape):
                raise ValueError(
                    f"rank {rank} is above the smaller side of a matrix of shape {tuple(p.shape)}: lower it"
                )

    @torch.no_grad()
    def update(optimizer: Any, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) in chosen and p.grad is not None:
                    state = optimizer.state[p]
                    if not state or state["step"] % update_gap == 0:
                        state["projection"] = top_singular_vectors(p.grad, rank)
                    projected_update(p, state, group, scale=scale, state_dtype=optimizer.state_dtype)
                    p.grad = None

    optimizer.register_step_pre_hook(update)


def top_singular_vectors(gradient: Tensor, rank: int) -> Tensor:
    """P of a gradient (m, n): (rank, n) where m >= n, else (m, rank); in the gradient's dtype, from an SVD in fp32."""
    import torch

    u, _, vh = torch.linalg.svd(gradient.float(), full_matrices=False)
    vectors: Tensor = vh[:rank] if gradient.shape[0] >= gradient.shape[1] else u[:, :rank]
    # a copy: a view would keep all singular vectors alive
    return vectors.to(gradient.dtype, copy=True, memory_format=torch.contiguous_format)


def project(gradient: Tensor, projection: Tensor) -> Tensor:
    """R of a gradient (m, n) in the rows (rank, n) or columns (m, rank) of its projection."""
    tall = gradient.shape[0] >= gradient.shape[1]
    return gradient @ projection.t() if tall else projection.t() @ gradient


def adam_direction(low: Tensor, state: dict[str, Any], group: dict[str, Any], *, state_dtype: torch.dtype) -> Tensor:
    """-lr * N, Adam's step for the projected gradient `low`; moments and step count in `state` go one step on.

    The result has the shape of `low` and the moments' dtype. Decay is left to the caller.
    """
    import torch

    from grass.adamw import update_piece

    if "step" not in state:
        state |= {"step": 0, "exp_avg": torch.zeros_like(low, dtype=state_dtype)}
        state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
    state["step"] += 1
    move = torch.zeros_like(state["exp_avg"])
    undecayed = {**group, "weight_decay": 0.0}
    update_piece(move, low, state["exp_avg"], state["exp_avg_sq"], step=state["step"], group=undecayed)
    return move


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
