"""AdamW whose moments have a dtype of their own, with a step count per parameter.

`torch.optim.AdamW` keeps its moments in the parameter's dtype. A bf16 second moment with beta2 = 0.999 never decays
(0.999 v rounds back to v), so bf16 weights want fp32 moments. In fp32 this is torch's update, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Moments = dict[str, Any]
"""One parameter's state: `step` (int), `exp_avg` and `exp_avg_sq` (the parameter's shape, the moments' dtype)."""


def new_moments(parameter: nn.Parameter, dtype: torch.dtype) -> Moments:
    """Zero moments for `parameter`, on its device."""
    zeros = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
    return {"step": 0, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


@torch.no_grad()
def adamw_update(
    parameter: nn.Parameter,
    moments: Moments,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step of one parameter from its `.grad`, in place (Loshchilov and Hutter 2019, algorithm 2).

    The arithmetic is done in the moments' dtype; the weight is rounded to its own dtype once, at the end.
    """
    assert parameter.grad is not None
    first, second = moments["exp_avg"], moments["exp_avg_sq"]
    gradient: Tensor = parameter.grad.to(first.dtype)
    moments["step"] += 1
    step = moments["step"]
    first.lerp_(gradient, 1 - betas[0])
    second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    step_size = lr / (1 - betas[0] ** step)
    denominator = (second.sqrt() / (1 - betas[1] ** step) ** 0.5).add_(eps)
    if parameter.dtype == first.dtype:
        parameter.mul_(1 - lr * weight_decay)
        parameter.addcdiv_(first, denominator, value=-step_size)
    else:
        weight = parameter.to(first.dtype).mul_(1 - lr * weight_decay)
        parameter.copy_(weight.addcdiv_(first, denominator, value=-step_size))


class AdamW(Optimizer):
    """AdamW over any parameters; those without a gradient are left alone, state and weight decay included."""

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.state_dtype = state_dtype
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if not self.state[parameter]:
                        self.state[parameter] = new_moments(parameter, self.state_dtype)
                    update_in_group(parameter, self.state[parameter], group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore exactly; the base class would cast the moments to the parameters' dtype."""
        super().load_state_dict(state_dict)
        restore_exactly(self, state_dict)


def update_in_group(parameter: nn.Parameter, moments: Moments, group: dict[str, Any]) -> None:
    """`adamw_update` with a parameter group's hyper-parameters."""
    adamw_update(
        parameter,
        moments,
        lr=group["lr"],
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
    )


def restore_exactly(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Put the moments of `state_dict` back in their own dtype, each on the device it was saved from or its parameter's.

    Host moments stay on the host: a tensor saved from the CPU is not sent to the device here.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        saved = state_dict["state"].get(number)
        if saved is not None:
            optimizer.state[parameter] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in saved.items()}
