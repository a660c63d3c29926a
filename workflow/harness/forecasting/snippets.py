"""A training script for a cell, as a user would write it for just this method under these settings.

It runs as it stands, with a model and texts of the user's: with `grass`, `peft` and transformers alone where the method
is theirs, else with the method's own file in `baselines`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness.step.spec import Cell

LR_NOTE = "# a first guess: search the rate on validation rows"


def snippet(cell: Cell, *, model: str) -> str:
    """A script that trains `model` (a folder or a name on the hub) as the cell says."""
    imports, attach, step = _parts_of(cell)(cell)
    chunked = cell.settings.chunked_loss
    lines = [
        *(["from itertools import islice", ""] if any("islice" in line for line in attach) else []),
        "import torch",
        *sorted([
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            *(["from torch.nn.functional import pad"] if chunked else []),
        ]),
        "",
        *sorted([*imports, *(["from grass.loss import chunked_cross_entropy"] if chunked else [])]),
        "",
        f"MODEL = {model!r}",
        'TEXTS = ["The capital of France is Paris."] * 8  # your rows',
        'CALIBRATION = ["Two and two make four."] * 4  # some dozens of rows that are not trained on',
        "",
        "tokenizer = AutoTokenizer.from_pretrained(MODEL)",
        "tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token",
        f"model = AutoModelForCausalLM.from_pretrained(MODEL, dtype={_dtype(cell.numerics.weight_dtype)})",
        'model = model.to("cuda").train()',
        *(_CHECKPOINTING if cell.settings.activation_checkpointing else []),
        "",
        "",
        "def batches(texts):",
        f"    for start in range(0, len(texts), {cell.shape.batch}):",
        f"        some = texts[start : start + {cell.shape.batch}]",
        f"        rows = tokenizer(some, truncation=True, max_length={cell.shape.length}, padding=True, "
        'return_tensors="pt").to("cuda")',
        '        ids, mask = rows["input_ids"], rows["attention_mask"]',
        '        yield {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}',
        "",
        "",
        *(_CHUNKED_LOSS if chunked else _LOSS),
        "",
        "",
        *attach,
        "for step, batch in enumerate(batches(TEXTS)):",
        *(f"    {line}" for line in step),
    ]  # fmt: skip
    return "\n".join(lines)


_CHECKPOINTING = [
    'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})',
    "model.disable_input_require_grads()  # else backward visits layers that need no gradient",
]
_LOSS = ["def loss_of(model, batch):", "    return model(**batch, use_cache=False).loss"]
_CHUNKED_LOSS = [
    "body, head = model.base_model, model.get_output_embeddings()",
    "",
    "",
    "def loss_of(model, batch):  # the logits of all tokens never exist at once",
    '    ids, mask = batch["input_ids"], batch["attention_mask"]',
    "    hidden = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state",
    '    targets = pad(batch["labels"][:, 1:], (0, 1), value=-100).flatten()',
    "    total = chunked_cross_entropy(hidden.flatten(0, 1), head.weight, targets, head.bias)",
    "    return total / (targets != -100).sum()",
]

Parts = tuple[list[str], list[str], list[str]]
"""Imports, what comes before the loop, and the body of the loop."""


def _parts_of(cell: Cell) -> Callable[[Cell], Parts]:
    if cell.module in ("lora", "dora"):
        # LoRA+ has two rates, which takes the method's own groups
        return _peft if _known(cell)["lr_ratio"] == 1 else _by_contract
    return {"grass": _grass, "full": _full}.get(cell.module, _by_contract)


def _grass(cell: Cell) -> Parts:
    from grass.sampling import NEEDS_PROBE

    known = _known(cell)
    # what an entry leaves out, or sets to None, is the library's own default
    options = {name: value for name, value in cell.options.items() if value is not None and name not in _PROBES}
    options |= {"state_dtype": cell.numerics.state_dtype, "max_grad_norm": cell.numerics.max_grad_norm}
    options |= {"stochastic_rounding": True} if cell.numerics.stochastic_rounding else {}
    probe = f"islice(batches(CALIBRATION), {known['probe_steps']})"
    reprobe = f", reprobe=lambda: {probe}" if known["reprobe"] else ""
    attach = [f"optimizer = Grass(model, lr={cell.lr!r}, {_arguments(options)}{reprobe})  {LR_NOTE}"]
    if known["sampler"] in NEEDS_PROBE:
        attach.append(f"optimizer.probe({probe}, loss_of)")
    return ["from grass import Grass"], attach, _STEP


_PROBES = ("probe_steps", "reprobe")
"""Options of the method that are arguments of `Grass.probe`, or batches."""


def _peft(cell: Cell) -> Parts:
    known, method = _known(cell), cell.method_class()
    options = {
        "r": known["rank"],
        "lora_alpha": known["alpha"],
        "lora_dropout": known["dropout"],
        "target_modules": list(known["targets"]) if known["targets"] else "all-linear",
        "task_type": "CAUSAL_LM",
        **({"use_rslora": True} if known["rslora"] else {}),
        **({"init_lora_weights": known["init"]} if known["init"] == "pissa" else {}),
        **getattr(method, "PEFT_OPTIONS", {}),
    }
    imports, attach, step = _with_adamw(cell, "[p for p in model.parameters() if p.requires_grad]")
    adapters = [
        f"adapters = LoraConfig({_arguments(options)})",
        f"model = get_peft_model(model, adapters, autocast_adapter_dtype={known['adapter_dtype'] == 'fp32'})",
    ]
    return ["from peft import LoraConfig, get_peft_model", *imports], [*adapters, *attach], step


def _full(cell: Cell) -> Parts:
    return _with_adamw(cell, "model.parameters()")


def _with_adamw(cell: Cell, parameters: str) -> Parts:
    packed = cell.numerics.state_dtype == "int8"
    options = f"lr={cell.lr!r}, state_dtype={'PACKED' if packed else _dtype(cell.numerics.state_dtype)}"
    options += ", stochastic_rounding=True" if cell.numerics.stochastic_rounding else ""
    limit = cell.numerics.max_grad_norm
    clip = [] if limit is None else [f"torch.nn.utils.clip_grad_norm_(model.parameters(), {limit})"]
    attach = [f"optimizer = AdamW({parameters}, {options})  {LR_NOTE}"]
    imports = ["from grass.adamw import AdamW", *(["from grass.quantised import PACKED"] if packed else [])]
    return imports, attach, [_STEP[0], *clip, *_STEP[1:]]


_STEP = ["loss_of(model, batch).backward()", "optimizer.step()", "optimizer.zero_grad()"]


def _by_contract(cell: Cell) -> Parts:
    """Any other method, by its file in `baselines`, attached as the harness attaches it."""
    recipe = cell.recipe(steps=1000, device="cuda")
    attach = [
        "class Calibration:  # what some methods measure before the first step",
        "    def batches(self, count):",
        "        return islice(batches(CALIBRATION), count)",
        "",
        "    def loss(self, model, batch):",
        "        return loss_of(model, batch)",
        "",
        "",
        f'method_class = find_method("{cell.module}")',
        f"recipe = Recipe({_arguments(recipe.model_dump())})",
        f"options = method_class.Config({_arguments(cell.options)})",
        f"method = method_class(options, recipe=recipe, lr={cell.lr!r}, seed=0)  {LR_NOTE}",
        "method.calibration = Calibration()",
        "model = method.attach(model).train()",
        "method.prepare(method.calibration)",
    ]
    step = [
        "method.begin_step(step)",
        "method.backward(loss_of(model, batch), last=True)",
        "method.end_step(lambda: iter([loss_of(model, batch)]))",
    ]
    return ["from baselines import find_method", "from baselines.method import Recipe"], attach, step


def _known(cell: Cell) -> dict[str, Any]:
    return cell.method_class().Config.model_validate(cell.options, strict=False).model_dump()


def _dtype(name: str) -> str:
    return {"bf16": "torch.bfloat16", "fp32": "torch.float32"}[name]


def _arguments(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())
