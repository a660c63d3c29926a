"""Plain loops without a package of their own: torch's AdamW, LISA as its ports train it, peft's LoRA."""

from __future__ import annotations

from typing import Any

import torch

from grass.layers import find_layers
from harness.efficiency.arithmetic import PERIOD
from harness.efficiency.peers.contenders import LR, Bench, Loop

LORA = {"rank": 16, "alpha": 32.0}


def adamw(bench: Bench, *, clip: float | None, **form: Any) -> Loop:
    """Torch's AdamW over all parameters."""
    model = bench.model()
    return Loop(bench, model, torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, **form), clip=clip)


def lisa(bench: Bench, *, clip: float | None, **form: Any) -> Loop:
    """What the callbacks of LMFlow, axolotl and ms-swift do: at each draw all layers are frozen, then some are not.

    The optimizer holds all layers, and nothing is ever dropped from it.
    """
    model = bench.model()
    layers = list(find_layers(model).layers)

    def begin(number: int) -> None:
        if number % PERIOD:
            return
        for layer in layers:
            layer.requires_grad_(False)
        for drawn in bench.drawn(number):
            layers[drawn].requires_grad_(True)

    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, **form)
    return Loop(bench, model, optimizer, clip=clip, begin=begin)


def peft_lora(bench: Bench, *, clip: float | None, **form: Any) -> Loop:
    """Peft's LoRA on every linear layer but the head, under torch's AdamW."""
    from peft import LoraConfig, get_peft_model

    model: Any = bench.model()
    config = LoraConfig(r=LORA["rank"], lora_alpha=LORA["alpha"], target_modules="all-linear", task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(model, config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    return Loop(bench, adapted, torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, **form), clip=clip)
