"""Sound scripts that write weights themselves, between the optimizer's steps."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from grass_tiny import batch, llama
from harness.audit import Audit

from audited.common import adamw, audited, lisa, sound


@sound
def average_swapped_in_and_out(_: Path, *, back: bool = True) -> Audit:
    model = llama()
    optimizer = adamw(model.parameters())
    average = copy.deepcopy(model)

    def swap(step: int) -> None:
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(p, 0.1)
            if step % 4 == 3:
                kept = [p.detach().clone() for p in model.parameters()]
                for a, p in zip(average.parameters(), model.parameters(), strict=True):
                    p.data.copy_(a)  # as most implementations do, past torch's version counter
                model(**batch(99))
                if back:
                    for k, p in zip(kept, model.parameters(), strict=True):
                        p.data.copy_(k)

    return audited(model, optimizer, lambda: lisa(model, optimizer, between=swap))


@sound
def average_loaded_for_good(path: Path) -> Audit:
    return average_swapped_in_and_out(path, back=False)


@sound
def weights_written_by_the_script(_: Path) -> Audit:
    model = llama()
    optimizer = adamw(model.parameters())

    def clamp(step: int) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.99)

    return audited(model, optimizer, lambda: lisa(model, optimizer, between=clamp))


@sound
def checkpoint_loaded_midway(_: Path) -> Audit:
    model = llama()
    optimizer = adamw(model.parameters())
    start = copy.deepcopy(model.state_dict())

    def back(step: int) -> None:
        if step == 7:
            model.load_state_dict(start)

    return audited(model, optimizer, lambda: lisa(model, optimizer, between=back))


@sound
def adapters_merged_midway(_: Path) -> Audit:
    """ReLoRA: the frozen base changes between steps."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    optimizer = adamw(p for p in model.parameters() if p.requires_grad)

    def run() -> None:
        for step in range(8):
            model(**batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step % 3 == 2:
                model.merge_adapter()
                for module in model.modules():
                    if hasattr(module, "merged_adapters"):
                        module.merged_adapters.clear()
                with torch.no_grad():
                    for name, p in model.named_parameters():
                        if "lora_B" in name:
                            p.zero_()
                optimizer.state.clear()

    return audited(model, optimizer, run, interval_steps=2)


@sound
def some_layers_stepped_by_hand(_: Path) -> Audit:
    model = llama()
    by_hand = list(model.model.layers[2:].parameters())
    optimizer = adamw(p for p in model.parameters() if not any(p is q for q in by_hand))

    def descend(step: int) -> None:
        with torch.no_grad():
            for p in by_hand:
                if p.grad is not None:
                    p -= 0.1 * p.grad
                    p.grad = None

    return audited(model, optimizer, lambda: lisa(model, optimizer, between=descend))
