"""Models and training loops that `Grass` cannot serve, each refused in one sentence.

Wrappers are known by the name of their class, so that nothing is imported that the caller has not imported.
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
    # Seen with torch 2.13, gloo, 2 processes: built while some layers sleep, the ranks part at the first draw of
    # others and nothing is raised, with find_unused_parameters or without; built while all train and without it, they
    # part in the first step, and the second raises.
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
"""Start of a class's full name, and why its modules are refused."""


def refuse_unfit_model(model: nn.Module) -> None:
    """Raise if `Grass` cannot train `model`, or would do so wrongly.

    Refused are a model that was compiled as a whole, peft adapters, DistributedDataParallel, DataParallel and FSDP
    around the model or any part of it, and parameters that are sharded (DTensor), on the meta device, quantised or
    float16. A wrapper that is put around the model later, in the training loop, cannot be seen from here.

    `torch.compile` keeps requires_grad of every parameter among its guards: a draw of other layers compiles the whole
    model anew, and after `torch._dynamo.config.recompile_limit` (8) such sets it runs uncompiled; the gradients stay
    right (seen with torch 2.13, a Llama of 6 layers, 2 active). Decoder layers that are compiled one by one
    (`layer.compile()`) need 4 versions in all, whatever is drawn (seen with `use_cache=False`), and are not refused.

    Args:
        model: what is to be given to `Grass`.

    Raises:
        ValueError: the model is one of these; the message names the first module or parameter, and what to do.
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
    """Raise if a `torch.amp.GradScaler` is stepping `optimizer`; for the first line of its `step`.

    The optimizer's class must say `_step_supports_amp_scaling = True`: the scaler then leaves it to the optimizer to
    handle scaled gradients, and sets its attributes `grad_scale` and `found_inf` for the length of every `step`,
    whether `unscale_` was called before or not (`torch/amp/grad_scaler.py`, `GradScaler.step`). Without the
    declaration the scaler hides: it calls `step` like anybody, or skips it. A scaler with `enabled=False` sets
    nothing and is let through.

    Raises:
        RuntimeError: a scaler calls. Its marks are taken off again, so that the next `step` without it works.
    """
    if not hasattr(optimizer, "found_inf"):
        return
    # the scaler takes them off only after a step that returns
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
