"""Models and training loops that `Grass` does not support, each rejected with a one-sentence error.

Wrappers are recognised by their class name, so that nothing is imported that the caller has not imported.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

_COMPILED = "torch._dynamo.eval_frame.OptimizedModule"
_WRAPPERS = {
    "peft.": (
        "carries peft adapters, and GRASS trains whole layers, the weights that peft keeps frozen included: merge the "
        "adapters and pass the plain model, or train them with an ordinary optimizer"
    ),
    # Observed with torch 2.13, gloo, 2 processes. Built while some layers are frozen, ranks diverge at the first draw #
    # of others and nothing is raised, with or without find_unused_parameters. Built while all layers train and without
    # # find_unused_parameters, ranks diverge in the first step, and the second raises.
    "torch.nn.parallel.distributed.DistributedDataParallel": (
        "is wrapped in DistributedDataParallel, whose reducer is built for one fixed set of parameters, so that the "
        "ranks silently diverge as other layers are drawn: pass the plain module (model.module), Grass.step() "
        "averages the gradients itself"
    ),
    "torch.nn.parallel.data_parallel.DataParallel": (
        "is wrapped in DataParallel, which copies all layers to every device in every step, sleeping ones included: "
        "pass the plain module (model.module) and start one process a device"
    ),
    "torch.distributed.fsdp.": (
        "is sharded by FSDP, and GRASS cannot yet measure and update layers of which a rank holds only a part: pass a "
        "model that is whole on every rank"
    ),
}
"""Prefix of a class's full name, and why its modules are rejected."""


def refuse_unfit_model(model: nn.Module) -> None:
    """Raise if `Grass` cannot train `model` correctly.

    It rejects a model that was compiled as a whole; peft adapters, DistributedDataParallel, DataParallel and FSDP
    around the model or any part of it; and parameters that are sharded (DTensor), on the meta device, quantised or
    float16. It cannot detect a wrapper that is put around the model later, in the training loop.

    `torch.compile` guards on `requires_grad` of every parameter: drawing other layers recompiles the whole model, and
    after `torch._dynamo.config.recompile_limit` (8) such sets it runs uncompiled; gradients stay correct (observed with
    torch 2.13, a Llama of 6 layers, 2 active). Decoder layers that are compiled one by one (`layer.compile()`) need 4
    versions in total, whatever is drawn (observed with `use_cache=False`), and are accepted.

    Args: model: the model to pass to `Grass`.

    Raises: ValueError: the model is rejected; the message names the first module or parameter, and what to do.
    """
    if _COMPILED in _class_names(model) or model._compiled_call_impl is not None:
        raise ValueError(
            "the model is compiled as a whole, so that every draw of other layers compiles it again until torch gives "
            "up and runs it uncompiled: pass the original model, uncompiled"
        )
    for name, module in model.named_modules():
        for full in _class_names(module):
            for start, reason in _WRAPPERS.items():
                if full.startswith(start):
                    raise ValueError(f"{f'the module {name}' if name else 'the model'} {reason}")
    for name, parameter in model.named_parameters():
        _refuse_unfit_parameter(name, parameter)
    # the weights of some quantised formats (GPTQ, AWQ) are buffers
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(
            "the model is quantised, and GRASS trains the weights themselves: load it unquantised, in bfloat16 or "
            "float32"
        )


def refuse_loss_scaling(optimizer: Optimizer) -> None:
    """Raise if a `torch.amp.GradScaler` is stepping `optimizer`; call this first in its `step`.

    The optimizer's class must set `_step_supports_amp_scaling = True`. The scaler then lets the optimizer handle scaled
    gradients, and sets the optimizer's attributes `grad_scale` and `found_inf` during every `step`, whether or not
    `unscale_` was called before (`torch/amp/grad_scaler.py`, `GradScaler.step`). Otherwise the scaler cannot be
    detected: it calls `step` like any caller, or skips it. A scaler with `enabled=False` sets nothing and is accepted.

    Raises: RuntimeError: a scaler calls `step`. Its attributes are removed, so that the next `step` without it works.
    """
    if not hasattr(optimizer, "found_inf"):
        return
    # the scaler removes them only after a step that returns
    for mark in ("grad_scale", "found_inf"):
        vars(optimizer).pop(mark, None)
    raise RuntimeError(
        "a GradScaler is stepping this optimizer, but GRASS measures gradients and loss scaling changes them: train "
        "without the scaler, in bfloat16 or float32"
    )


def _class_names(module: nn.Module) -> list[str]:
    return [f"{base.__module__}.{base.__qualname__}" for base in type(module).__mro__]


def _refuse_unfit_parameter(name: str, parameter: nn.Parameter) -> None:
    if type(parameter).__module__.startswith("torch.distributed.tensor"):
        raise ValueError(
            f"the parameter {name} is a DTensor, and GRASS cannot yet measure and update layers of which a rank holds "
            "only a part: pass a model that is whole on every rank"
        )
    if parameter.is_meta:
        raise ValueError(
            f"the parameter {name} is on the meta device, where it has no values: load the weights, without offloading "
            "them, before creating Grass"
        )
    if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
        raise ValueError(
            f"the parameter {name} is quantised ({parameter.dtype}), and GRASS trains the weights themselves: load the "
            "model unquantised, in bfloat16 or float32"
        )
    if parameter.dtype == torch.float16:
        raise ValueError(
            f"the parameter {name} is float16, whose gradients need loss scaling, and that is refused because GRASS "
            "measures gradients: load the model in bfloat16 or float32"
        )
