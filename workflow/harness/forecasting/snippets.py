"""A training script for a cell, as a user would write it for just this method under these settings."""

from __future__ import annotations

from typing import Any

from harness.step.spec import Cell


def snippet(cell: Cell, *, model: str) -> str:
    """A script that trains `model` (a folder or a name on the hub) as the cell says.

    The script expects two names to be defined: `batches`, each with `input_ids`, `attention_mask` and `labels` on the
    GPU, and for GRASS `calibration`, some dozens of such batches that are not taken from the training data.
    """
    attach, loop = _METHODS.get(cell.module, _by_contract)(cell)
    loss = "chunked_token_loss" if cell.settings.chunked_loss else "token_loss"
    return "\n".join(
        [
            "import torch",
            "from transformers import AutoModelForCausalLM",
            f"from harness.step.loss import {loss}, label_tokens",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{model}", dtype={_dtype(cell.numerics.weight_dtype)})',
            'model = model.to("cuda").train()',
            *_settings(cell),
            "",
            *attach,
            "",
            "for step, batch in enumerate(batches):",
            *(f"    {line.format(loss=f'{loss}(model, batch) / label_tokens(batch)')}" for line in loop),
        ]
    )


def _settings(cell: Cell) -> list[str]:
    if not cell.settings.activation_checkpointing:
        return []
    return [
        'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})',
        "model.disable_input_require_grads()  # else backward visits layers that need no gradient",
    ]


def _grass(cell: Cell) -> tuple[list[str], list[str]]:
    known = _known(cell)
    # None in the entry means the library's default
    named = ("active_layers", "sample_every", "sampler", "offload")
    options = {name: known[name] for name in named if known[name] is not None}
    options |= {name: False for name in ("train_embedding", "train_head", "train_final_norm") if not known[name]}
    options |= {"state_dtype": cell.numerics.state_dtype, "max_grad_norm": cell.numerics.max_grad_norm}
    attach = [
        "from grass import Grass",
        "",
        f"optimizer = Grass(model, lr={cell.lr!r}, {_arguments(options)})",
        f"optimizer.probe(calibration, lambda model, batch: {_loss(cell)}(model, batch) / label_tokens(batch))",
    ]
    return attach, ["({loss}).backward()", "optimizer.step()", "optimizer.zero_grad()"]


def _lora(cell: Cell) -> tuple[list[str], list[str]]:
    known = _known(cell)
    options = {
        "r": known["rank"],
        "lora_alpha": known["alpha"],
        "lora_dropout": known["dropout"],
        "target_modules": list(known["targets"]) if known["targets"] else "all-linear",
        "task_type": "CAUSAL_LM",
    }
    attach = [
        "from peft import LoraConfig, get_peft_model",
        "",
        f"adapters = LoraConfig({_arguments(options)})",
        f"model = get_peft_model(model, adapters, autocast_adapter_dtype={known['adapter_dtype'] == 'fp32'})",
    ]
    return _with_adamw(cell, attach, "[p for p in model.parameters() if p.requires_grad]")


def _full(cell: Cell) -> tuple[list[str], list[str]]:
    return _with_adamw(cell, [], "model.parameters()")


def _with_adamw(cell: Cell, attach: list[str], parameters: str) -> tuple[list[str], list[str]]:
    options = f"lr={cell.lr!r}, state_dtype={_dtype(cell.numerics.state_dtype)}"
    made = ["from grass.adamw import AdamW", "", f"optimizer = AdamW({parameters}, {options})"]
    limit = cell.numerics.max_grad_norm
    clip = [] if limit is None else [f"torch.nn.utils.clip_grad_norm_(model.parameters(), {limit})"]
    return [*attach, *made], ["({loss}).backward()", *clip, "optimizer.step()", "optimizer.zero_grad()"]


def _by_contract(cell: Cell) -> tuple[list[str], list[str]]:
    """Any other method, attached as the harness attaches it."""
    recipe = cell.recipe(steps=1000, device="cuda")
    attach = [
        "from baselines import find_method",
        "from baselines.method import Recipe",
        "",
        f'method_class = find_method("{cell.module}")',
        f"recipe = Recipe({_arguments(recipe.model_dump())})",
        f"options = method_class.Config({_arguments(cell.options)})",
        f"method = method_class(options, recipe=recipe, lr={cell.lr!r}, seed=0)",
        "model = method.attach(model)",
    ]
    loop = ["method.begin_step(step)", "method.backward({loss}, last=True)", "method.end_step(lambda: iter(()))"]
    return attach, loop


def _known(cell: Cell) -> dict[str, Any]:
    return cell.method_class().Config.model_validate(cell.options, strict=False).model_dump()


def _loss(cell: Cell) -> str:
    return "chunked_token_loss" if cell.settings.chunked_loss else "token_loss"


def _dtype(name: str) -> str:
    return {"bf16": "torch.bfloat16", "fp32": "torch.float32"}[name]


def _arguments(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


_METHODS = {"grass": _grass, "lora": _lora, "full": _full}
