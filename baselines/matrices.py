"""Helpers for methods that choose, project or measure single tensors of the decoder layers; not a method itself.

They list tensors, project a matrix's gradient and run Adam on the projection, reduce gradients as they appear, and keep
fp32 copies of trained bf16 weights. How a method uses them is in its own file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from baselines.method import ModelFacts, Recipe


# ------------------------------------------------------------ which tensors


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
    """Whether the module `name` is among `targets`, which are last parts of module names; None matches all."""
    return targets is None or any(name == target or name.endswith(f".{target}") for target in targets)


def weights_of(model: nn.Module, targets: Sequence[str] | None = None) -> list[dict[str, nn.Parameter]]:
    """Weights of `linears_of`, by layer and name."""
    return [{name: m.weight for name, m in layer.items()} for layer in linears_of(model, targets)]  # type: ignore[misc]


def matrices_of(model: nn.Module, targets: Sequence[str] | None = None) -> list[nn.Parameter]:
    """Weights of `linears_of` in one list, bottom first."""
    return [weight for layer in weights_of(model, targets) for weight in layer.values()]


def layer_tensors(facts: ModelFacts) -> dict[str, int]:
    """Size of each parameter tensor of the decoder layers, by name, from the model facts alone.

    A tensor is taken to be in a layer if one part of its name is a number.
    """
    sizes = facts.tensor_parameters.items()
    return {name: size for name, size in sizes if any(part.isdigit() for part in name.split("."))}


def by_layer(values: Sequence[float], layer_of: Sequence[int]) -> list[list[float]]:
    """Values of each layer's tensors, bottom first.

    Args:
        values: one per tensor; those beyond the end of `layer_of` are in no layer.
        layer_of: each tensor's layer, counted from 0; every layer has a tensor.
    """
    grouped: list[list[float]] = [[] for _ in range(max(layer_of) + 1)]
    for value, layer in zip(values, layer_of, strict=False):
        grouped[layer].append(value)
    return grouped


def train_only(model: nn.Module, tensors: Sequence[nn.Parameter], active: Sequence[int]) -> None:
    """Let only the `tensors` numbered in `active` have gradients; backward stops at the lowest layer among them.

    For models with a frozen embedding.
    """
    from grass.backward import stop_at_lowest_layer
    from grass.layers import set_trainable

    for number, tensor in enumerate(tensors):
        set_trainable([tensor], number in active)
    stop_at_lowest_layer(model)


# ------------------------------------------------------------ projecting


def rank_too_large(rank: int, facts: ModelFacts, targets: Sequence[str] | None = None) -> str | None:
    """Reason to skip if a target matrix is smaller than `rank` on its smaller side, or None.

    Facts hold sizes but no shapes, so one side of a decoder layer's matrix is assumed to be the model's width. If
    neither side is (a factored projection), `refuse_rank` still catches it.
    """
    width = facts.hidden_size
    for name, size in layer_tensors(facts).items():
        module, _, kind = name.rpartition(".")
        # a vector as long as the width is a norm's weight
        is_matrix = kind == "weight" and size > width
        if is_matrix and is_target(module, targets) and min(width, size // width) < rank:
            return f"rank {rank} is above the smaller side of {name}, {min(width, size // width)}"
    return None


def refuse_rank(rank: int, matrices: Iterable[Tensor]) -> None:
    """Reject a rank that is too large to project anything.

    Raises:
        ValueError: a matrix is smaller than `rank` on its smaller side.
    """
    for matrix in matrices:
        if rank > min(matrix.shape):
            raise ValueError(
                f"rank {rank} is above the smaller side of a matrix of shape {tuple(matrix.shape)}: lower it"
            )


def project(gradient: Tensor, projection: Tensor) -> Tensor:
    """R, a gradient (m, n) projected onto the rows (rank, n) or columns (m, rank) of `projection`."""
    tall = gradient.shape[0] >= gradient.shape[1]
    return gradient @ projection.t() if tall else projection.t() @ gradient


def adam_direction(low: Tensor, state: dict[str, Any], group: dict[str, Any], *, state_dtype: torch.dtype) -> Tensor:
    """-lr * N, Adam's step for the projected gradient `low`; updates the moments and the step count in `state`.

    The result has the shape of `low` and the moments' dtype. The caller applies weight decay.
    """
    import torch

    from grass.adamw import Entries, update_pieces

    if "step" not in state:
        state |= {"step": 0, "exp_avg": torch.zeros_like(low, dtype=state_dtype)}
        state["exp_avg_sq"] = torch.zeros_like(state["exp_avg"])
    state["step"] += 1
    move = torch.zeros_like(state["exp_avg"])
    undecayed = {**group, "weight_decay": 0.0}
    update_pieces([Entries(move, low, state["exp_avg"], state["exp_avg_sq"], state["step"])], undecayed)
    return move


def update_before_step(
    optimizer: torch.optim.Optimizer,
    matrices: Iterable[Tensor],
    update: Callable[[Any, dict[str, Any], dict[str, Any]], None],
) -> None:
    """Make every `optimizer.step` begin with `update(weight, state, group)` for all `matrices` that have a gradient.

    The gradient of an updated matrix is then freed, so the step's own update skips that matrix.

    Args:
        optimizer: optimizer that holds the matrices; `state` is its state of one matrix, empty at first.
        matrices: two-dimensional parameters.
        update: changes the weight by its gradient; called under `torch.no_grad()`.
    """
    import torch

    chosen = {id(p) for p in matrices}

    @torch.no_grad()
    def hook(optimizer: Any, args: Any, kwargs: Any) -> None:
        for group in optimizer.param_groups:
            for p in group["params"]:
                if id(p) in chosen and p.grad is not None:
                    update(p, optimizer.state[p], group)
                    p.grad = None

    optimizer.register_step_pre_hook(hook)


# ------------------------------------------------------------ measuring


@contextmanager
def gradients_used_up(parameters: Sequence[nn.Parameter], use: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Inside the block, `parameters` have gradients, each freed as soon as a backward pass completes it.

    Afterwards the parameters are frozen. At most one of these gradients is alive at a time.

    Args:
        parameters: parameters to measure.
        use: called with a parameter's index in `parameters` and its gradient in fp32.
    """
    from grass.layers import set_trainable

    def hook(number: int) -> Callable[[Any], None]:
        def completed(parameter: Any) -> None:
            gradient, parameter.grad = parameter.grad.float(), None
            use(number, gradient)

        return completed

    set_trainable(parameters, True)
    handles = [p.register_post_accumulate_grad_hook(hook(number)) for number, p in enumerate(parameters)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        set_trainable(parameters, False)


# ------------------------------------------------------------ fp32 copies of what trains


def copied_bytes(recipe: Recipe) -> int:
    """Bytes of an fp32 copy per parameter; 0 if weights are fp32, since they need no copy."""
    return 4 if recipe.weight_dtype == "bf16" else 0


def trained_copy(weight: Tensor, recipe: Recipe) -> Tensor:
    """The tensor that the optimizer updates: an fp32 copy of a bf16 weight, otherwise the weight itself."""
    return weight.detach().float() if recipe.weight_dtype == "bf16" else weight


def give_gradients(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Move each weight's gradient to its fp32 copy; a weight paired with itself is skipped."""
    for weight, copy in pairs:
        if copy is not weight and weight.grad is not None:
            copy.grad, weight.grad = weight.grad.float(), None


def round_into_weights(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Round each updated fp32 copy into its weight."""
    import torch

    with torch.no_grad():
        for weight, copy in pairs:
            if copy is not weight:
                weight.copy_(copy)
