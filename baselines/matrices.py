"""What methods share that choose, project or measure single tensors of the decoder layers; no method by itself.

Which tensors there are, the projection of a matrix's gradient and Adam in it, gradients that are reduced as they come,
and the fp32 copies of bf16 weights that train. What a method does with them stands in its own file.
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
    """Whether the module `name` is among `targets`, which name the last parts of modules; None takes all."""
    return targets is None or any(name == target or name.endswith(f".{target}") for target in targets)


def weights_of(model: nn.Module, targets: Sequence[str] | None = None) -> list[dict[str, nn.Parameter]]:
    """Weights of `linears_of`, by layer and name."""
    return [{name: m.weight for name, m in layer.items()} for layer in linears_of(model, targets)]  # type: ignore[misc]


def matrices_of(model: nn.Module, targets: Sequence[str] | None = None) -> list[nn.Parameter]:
    """Weights of `linears_of` in one list, bottom first."""
    return [weight for layer in weights_of(model, targets) for weight in layer.values()]


def layer_tensors(facts: ModelFacts) -> dict[str, int]:
    """Size of each parameter tensor of the decoder layers, by name, where only the facts are known.

    A layer's tensors are those with its number among the parts of their names.
    """
    sizes = facts.tensor_parameters.items()
    return {name: size for name, size in sizes if any(part.isdigit() for part in name.split("."))}


def by_layer(values: Sequence[float], layer_of: Sequence[int]) -> list[list[float]]:
    """Values of each layer's tensors, bottom first.

    Args:
        values: one a tensor; those beyond the end of `layer_of` lie in no layer.
        layer_of: each tensor's layer, counted from 0; no layer is without a tensor.
    """
    grouped: list[list[float]] = [[] for _ in range(max(layer_of) + 1)]
    for value, layer in zip(values, layer_of, strict=False):
        grouped[layer].append(value)
    return grouped


def train_only(model: nn.Module, tensors: Sequence[nn.Parameter], active: Sequence[int]) -> None:
    """Let those of `tensors` have gradients whose numbers are `active`; backward stops at the lowest layer of them.

    For models whose embedding sleeps.
    """
    from grass.backward import stop_at_lowest_layer
    from grass.layers import set_trainable

    for number, tensor in enumerate(tensors):
        set_trainable([tensor], number in active)
    stop_at_lowest_layer(model)


# ------------------------------------------------------------ projecting


def rank_too_large(rank: int, facts: ModelFacts, targets: Sequence[str] | None = None) -> str | None:
    """Reason to skip where a target matrix is smaller than `rank` on its smaller side, or None.

    Facts hold sizes, no shapes: one side of a decoder layer's matrix is taken to be the model's width. Where neither is
    (a factored projection), `refuse_rank` still refuses.
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
    """Refuse what projects nothing.

    Raises:
        ValueError: a matrix is smaller than `rank` on its smaller side.
    """
    for matrix in matrices:
        if rank > min(matrix.shape):
            raise ValueError(
                f"rank {rank} is above the smaller side of a matrix of shape {tuple(matrix.shape)}: lower it"
            )


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


def update_before_step(
    optimizer: torch.optim.Optimizer,
    matrices: Iterable[Tensor],
    update: Callable[[Any, dict[str, Any], dict[str, Any]], None],
) -> None:
    """Let every `optimizer.step` begin with `update(weight, state, group)` of those `matrices` that have a gradient.

    A matrix that was updated has no gradient any more when the step's own update comes, which leaves it alone.

    Args:
        optimizer: holds the matrices; `state` is what it holds for one, empty at first.
        matrices: of two dimensions.
        update: changes the weight by its gradient, without autograd.
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
    """While this lasts `parameters` have gradients, each freed as soon as a backward pass completes it.

    Afterwards they are frozen. At no time is more than one of these gradients alive.

    Args:
        parameters: what to measure.
        use: is given a parameter's place in `parameters`, and its gradient in fp32.
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
    """Bytes that an fp32 copy takes for one parameter: none where weights are fp32, since they need no copy."""
    return 4 if recipe.weight_dtype == "bf16" else 0


def trained_copy(weight: Tensor, recipe: Recipe) -> Tensor:
    """What the optimizer updates in the weight's place: an fp32 copy of a bf16 weight, else the weight itself."""
    return weight.detach().float() if recipe.weight_dtype == "bf16" else weight


def give_gradients(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Hand each weight's gradient on to its fp32 copy; nothing to do where a weight is paired with itself."""
    for weight, copy in pairs:
        if copy is not weight and weight.grad is not None:
            copy.grad, weight.grad = weight.grad.float(), None


def round_into_weights(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Let each weight follow its updated fp32 copy."""
    import torch

    with torch.no_grad():
        for weight, copy in pairs:
            if copy is not weight:
                weight.copy_(copy)
