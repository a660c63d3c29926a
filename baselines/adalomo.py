"""AdaLomo: every weight is updated inside backward, by a factored second moment (arXiv 2310.10195, ACL 2024 Findings).

The gradient g of a parameter is used and freed as soon as it is complete, so one gradient is alive at a time. With the
row means r and column means c of g^2, averaged over steps, v = r c / mean(r), u = g / sqrt(v), and

    w -= lr * max(1e-3, RMS(w)) * u / max(1, RMS(u))

(paper, algorithm 1: factored moment, grouped update normalisation). There is no first moment, and lr is relative to the
weights' own size, so rates are larger than AdamW's: the authors advise 5e-4 to 1e-3. From their code (OpenLMLab/LOMO,
lomo_optim/adalomo.py): means where the paper has sums, 1e-30 added to g^2, beta_t = 1 - t^-0.8 for t = 1, 2, ..., a
plain second moment for parameters of one dimension, arithmetic in fp32, and decay as w *= 1 - lr * max(1e-3, RMS(w)) *
decay before the update. Ours: averages are stored in the recipe's state dtype; the recipe's betas and eps are not used.

Every backward pass updates the weights, so gradients cannot be accumulated. The first weights change before the last
gradients exist, so gradients cannot be clipped by their global norm. (The code clips by running backward twice and
advises against it.) Recipes with accumulation or clipping are skipped.
"""

from __future__ import annotations

from math import prod, sqrt
from typing import TYPE_CHECKING, Any, ClassVar

from baselines.method import (
    Expectation,
    Method,
    ModelFacts,
    Options,
    StepFacts,
    adamw,
    host_number,
    moment_bytes,
    torch_dtype,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from baselines.method import Recipe

DECAY_EXPONENT = -0.8
SMALLEST_SQUARE = 1e-30
SMALLEST_RMS = 1e-3
LARGEST_UPDATE_RMS = 1.0


class AdaLomoOptions(Options):
    """AdaLomo has none: its constants are the code's."""


class AdaLomo(Method):
    """Everything trains; no gradients and no full-size moments of matrices are kept."""

    Config = AdaLomoOptions
    PAPER = "arXiv 2310.10195"
    EXAMPLE_RECIPE: ClassVar[dict[str, Any]] = {"max_grad_norm": None}
    EXAMPLE_LR: ClassVar[float] = 3e-2
    """The rate is relative to weights of size 0.02, so AdamW's rate would change almost nothing in a dozen steps."""
    options: AdaLomoOptions

    def __init__(self, options: Options, *, recipe: Recipe, lr: float, seed: int) -> None:
        super().__init__(options, recipe=recipe, lr=lr, seed=seed)
        self._squares: list[Tensor] | None = None
        """Squared norms of this step's gradients; None outside a step, when hooks must ignore gradients."""

    def skip(self, facts: ModelFacts) -> str | None:
        """Skip recipes with accumulation or clipping: every backward pass changes the weights."""
        if self.recipe.accumulation_steps > 1:
            return (
                f"gradient accumulation over {self.recipe.accumulation_steps} micro-batches: every backward pass "
                "updates the weights; set micro_batch_size to batch_size"
            )
        if self.recipe.max_grad_norm is not None:
            return (
                "clipping (max_grad_norm): weights are updated before the norm of all gradients is known; set "
                "max_grad_norm to null"
            )
        return None

    def attach(self, model: nn.Module) -> nn.Module:
        """Create all states, and register a hook on every parameter."""
        import torch

        self.model = model.requires_grad_(True)
        parameters, dtype = list(model.parameters()), torch_dtype(self.recipe.state_dtype)
        # it never steps: it holds the learning rate, and the states, whose dtypes its load_state_dict keeps
        self.optimizer = adamw(parameters, self.recipe, self.lr)
        for p in parameters:
            averages = {key: torch.zeros(shape, dtype=dtype, device=p.device) for key, shape in _shapes(p).items()}
            self.optimizer.state[p] = {"step": 0, **averages}
            p.register_post_accumulate_grad_hook(self._use_up)
        return model

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Backward; hooks update the weights meanwhile."""
        self._squares = []
        loss.backward()

    def end_step(self, replay: Callable[[], Iterator[Tensor]]) -> StepFacts:
        """Only read the gradient norm: the update is already done."""
        import torch

        assert self.optimizer is not None
        squares, self._squares = self._squares, None
        # drop gradients from backward passes other than `backward`
        self.optimizer.zero_grad(set_to_none=True)
        return StepFacts(grad_norm=host_number(torch.stack(squares).sum().sqrt()) if squares else None, clipped=False)

    def expect(self, facts: ModelFacts) -> Expectation:
        """Everything moves, no gradient is ever left, and a matrix's state is one row and one column."""
        assert self.optimizer is not None
        numbers = sum(prod(shape) for p in self.optimizer.state for shape in _shapes(p).values())
        return Expectation(
            layers="all",
            embedding=True,
            head=True,
            final_norm=True,
            gradients="consumed",
            trainable_parameters=facts.total_parameters,
            state_of="constant",
            state_bytes=numbers * moment_bytes(self.recipe) // 2,
        )

    def _use_up(self, parameter: Tensor) -> None:
        """Hook: update the parameter with its completed gradient, and free the gradient."""
        import torch

        if self._squares is None:
            return
        assert self.optimizer is not None
        assert parameter.grad is not None
        with torch.no_grad():
            gradient, parameter.grad = parameter.grad.float(), None
            self._squares.append(torch.linalg.vector_norm(gradient).square())
            group = self.optimizer.param_groups[0]
            adalomo_update(
                parameter, gradient, self.optimizer.state[parameter], lr=group["lr"], weight_decay=group["weight_decay"]
            )


def adalomo_update(
    weight: Tensor, gradient: Tensor, state: dict[str, Any], *, lr: float, weight_decay: float = 0.0
) -> None:
    """One step of one parameter.

    Args:
        weight: any shape and dtype; changed in place.
        gradient: fp32, the weight's shape.
        state: `step`, and `square` (the weight's shape) or, from two dimensions on, `row` (all but the last) and
            `column` (all but the last but one); updated in place.
        lr: relative to the weight's RMS.
        weight_decay: decoupled, also relative to the weight's RMS.
    """
    state["step"] += 1
    beta = 1 - state["step"] ** DECAY_EXPONENT
    square = gradient.square().add_(SMALLEST_SQUARE)
    if "square" in state:
        update = _averaged(state["square"], square, beta).rsqrt_().mul_(gradient)
    else:
        row = _averaged(state["row"], square.mean(-1), beta)
        column = _averaged(state["column"], square.mean(-2), beta)
        of_rows = (row / row.mean(-1, keepdim=True)).rsqrt_()
        update = square.copy_(gradient).mul_(of_rows.unsqueeze(-1)).mul_(column.rsqrt_().unsqueeze(-2))
    update.div_((_rms(update) / LARGEST_UPDATE_RMS).clamp_(min=1.0))
    exact = weight.float()
    rate = lr * _rms(exact).clamp_(min=SMALLEST_RMS)
    if weight_decay:
        exact = exact * (1 - rate * weight_decay)
    weight.copy_(exact - update.mul_(rate))


def _shapes(parameter: Tensor) -> dict[str, tuple[int, ...]]:
    """Averages that a parameter keeps, and their shapes."""
    shape = tuple(parameter.shape)
    return {"row": shape[:-1], "column": (*shape[:-2], shape[-1])} if len(shape) > 1 else {"square": shape}


def _averaged(stored: Tensor, new: Tensor, beta: float) -> Tensor:
    """Update the average `stored` with `new`, in its own dtype; return the new average in fp32."""
    averaged: Tensor = stored.float() * beta + new * (1 - beta)
    stored.copy_(averaged)
    return averaged


def _rms(tensor: Tensor) -> Tensor:
    import torch

    norm: Tensor = torch.linalg.vector_norm(tensor)
    return norm / sqrt(tensor.numel())
