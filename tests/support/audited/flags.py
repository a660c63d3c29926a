"""Sound scripts that switch, probe and freeze at unusual moments; adapters and tied weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from grass_tiny import batch, llama
from harness.audit import Audit

from audited.common import adamw, audited, lisa, sound, switch


@sound
def switched_between_backward_and_step(_: Path) -> Audit:
    """As a Trainer callback does in `on_pre_optimizer_step`: flags already say what trains next."""
    model = llama()
    optimizer = adamw(model.parameters())

    def run() -> None:
        switch(model, [0])
        for step in range(8):
            model(**batch(step)).loss.backward()
            switch(model, [(step + 1) % 4])
            optimizer.step()
            model.zero_grad()

    return audited(model, optimizer, run)


@sound
def switched_within_an_accumulation(_: Path) -> Audit:
    model = llama()
    optimizer = adamw(model.parameters())

    def run() -> None:
        for micro in range(16):
            switch(model, [micro % 4])
            model(**batch(micro)).loss.backward()
            if micro % 2:
                optimizer.step()
                optimizer.zero_grad()

    return audited(model, optimizer, run)


@sound
def all_layers_probed_before_each_draw(_: Path) -> Audit:
    model = llama()
    optimizer = adamw(model.parameters())

    def probe(step: int) -> None:
        if step % 3 == 2:
            switch(model, range(4))
            model(**batch(99)).loss.backward()
            model.zero_grad()

    return audited(model, optimizer, lambda: lisa(model, optimizer, between=probe))


@sound
def layers_switched_only_to_see_their_gradients(_: Path) -> Audit:
    model = llama()
    optimizer = adamw(model.lm_head.parameters())
    return audited(model, optimizer, lambda: lisa(model, optimizer))


@sound
def head_trained_without_freezing_the_rest(_: Path) -> Audit:
    model = llama()
    optimizer = adamw(model.lm_head.parameters())

    def run() -> None:
        for step in range(4):
            model(**batch(step)).loss.backward()
            optimizer.step()
            model.zero_grad()

    return audited(model, optimizer, run)


@sound
def zeros_kept_under_plain_descent(_: Path) -> Audit:
    """Plain SGD does not move by a gradient of zeros: the memory is wasted, the weights are right."""
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return audited(model, optimizer, lambda: lisa(model, optimizer, set_to_none=False))


@sound
def a_layer_is_never_reached(_: Path) -> Audit:
    """Layers skipped by design: the audit sees no gradient there, and cannot know why."""
    model = llama()
    optimizer = adamw(model.parameters())

    def run() -> None:
        for step in range(4):
            skipped = model.model.layers[3]
            skipped.forward = lambda hidden_states, **_: hidden_states
            model(**batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return audited(model, optimizer, run)


@sound
def tied_weights(_: Path) -> Audit:
    model = llama(tied=True)
    optimizer = adamw(model.parameters())
    return audited(model, optimizer, lambda: lisa(model, optimizer))


@sound
def adapters_and_modules_to_save(_: Path, *, tied: bool = False) -> Audit:
    from peft import LoraConfig, get_peft_model

    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}
    model = get_peft_model(llama(tied=tied), LoraConfig(r=2, task_type="CAUSAL_LM", **settings))
    optimizer = adamw(p for p in model.parameters() if p.requires_grad)

    def run() -> None:
        for step in range(4):
            model(**batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return audited(model, optimizer, run)


@sound
def tied_adapters_and_modules_to_save(path: Path) -> Audit:
    return adapters_and_modules_to_save(path, tied=True)


@sound
def grass_that_probes_again(_: Path) -> Audit:
    from grass import Grass

    model = llama()
    again: Any = lambda: [batch(-1)]  # noqa: E731
    opt = Grass(model, lr=1e-2, active_layers=1, sample_every=2, refresh_every=2, reprobe=again)
    opt.probe([batch(-2)])

    def run() -> None:
        for step in range(8):
            model(**batch(step)).loss.backward()
            opt.step()
            opt.zero_grad()

    return audited(model, opt, run)
