"""Sound scripts with several optimizers, some of which the audit is not given."""

from __future__ import annotations

from pathlib import Path

import torch
from grass_tiny import batch, llama
from harness.audit import Audit

from audited.common import adamw, audited, lisa, matrices_and_rest, sound, switch


@sound
def two_optimizers(_: Path, *, given: str = "both") -> Audit:
    model = llama()
    inner, rest = matrices_and_rest(model)
    both = [torch.optim.Muon(inner, lr=1e-2), adamw(rest)]
    chosen = {"both": both, "first": both[0], "second": both[1]}[given]
    return audited(model, chosen, lambda: lisa(model, *both))


@sound
def first_of_two_optimizers_given(path: Path) -> Audit:
    return two_optimizers(path, given="first")


@sound
def second_of_two_optimizers_given(path: Path) -> Audit:
    return two_optimizers(path, given="second")


@sound
def two_optimizers_each_zeroes_at_once(_: Path) -> Audit:
    model = llama()
    inner, rest = matrices_and_rest(model)
    both = [torch.optim.SGD(inner, lr=0.1), adamw(rest)]

    def run() -> None:
        for step in range(8):
            switch(model, [step % 4])
            model(**batch(step)).loss.backward()
            for optimizer in both:
                optimizer.step()
                optimizer.zero_grad()

    return audited(model, both, run)


@sound
def optimizers_by_turns(_: Path, *, given: str = "both") -> Audit:
    """As adversarial training does: one half is frozen while the other steps, with its old gradients still there."""
    model = llama()
    low, high = list(model.model.layers[:2].parameters()), list(model.model.layers[2:].parameters())
    both = [adamw(low), adamw(high)]

    def run() -> None:
        for step in range(8):
            for turn, half in enumerate((low, high)):
                for p in model.parameters():
                    p.requires_grad_(any(p is q for q in half))
                both[turn].zero_grad()
                model(**batch(step)).loss.backward()
                both[turn].step()

    return audited(model, both if given == "both" else both[0], run)


@sound
def one_of_the_optimizers_by_turns_given(path: Path) -> Audit:
    return optimizers_by_turns(path, given="first")


@sound
def a_second_optimizer_whose_turn_never_came(_: Path) -> Audit:
    model = llama()
    low = [p for layer in model.model.layers[:2] for p in layer.parameters()]
    often, seldom = adamw(low), adamw(model.model.layers[2:].parameters())

    def run() -> None:
        for step in range(8):
            switch(model, [step % 4])
            model(**batch(step)).loss.backward()
            often.step()
            often.zero_grad()
        seldom.zero_grad()

    return audited(model, often, run)


@sound
def parameters_in_two_optimizers(_: Path, *, given: str = "both") -> Audit:
    model = llama()
    both = [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(model.model.layers.parameters(), lr=0.01)]
    return audited(model, both if given == "both" else both[0], lambda: lisa(model, *both))


@sound
def one_of_two_that_share_given(path: Path) -> Audit:
    return parameters_in_two_optimizers(path, given="first")


@sound
def sparse_gradients(_: Path) -> Audit:
    model = llama()
    model.model.embed_tokens.sparse = True
    table = model.model.embed_tokens.weight
    both = [torch.optim.SparseAdam([table]), adamw(p for p in model.parameters() if p is not table)]
    return audited(model, both, lambda: lisa(model, *both))
