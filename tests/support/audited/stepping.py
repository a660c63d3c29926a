"""Sound scripts with optimizers that step, and choose what to move, in ways of their own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from grass_tiny import batch, llama
from harness.audit import Audit

from audited.common import adamw, audited, lisa, sound, switch


class EveryThird(torch.optim.AdamW):
    """Adds gradients up, and updates at every third call."""

    calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        return super().step(closure) if self.calls % 3 == 0 else None


@sound
def updates_at_every_third_call(_: Path, *, steps: int = 12) -> Audit:
    model = llama()
    optimizer = EveryThird(model.parameters(), lr=1e-2)
    return audited(model, optimizer, lambda: lisa(model, optimizer, steps=steps))


@sound
def audited_for_two_of_three_calls(path: Path) -> Audit:
    return updates_at_every_third_call(path, steps=2)


@sound
def gradients_add_up_over_calls_while_layers_switch(_: Path) -> Audit:
    """Accumulation within the optimizer: a layer that trained in the first call sleeps when the update comes."""
    model = llama()
    optimizer = EveryThird(model.parameters(), lr=1e-2)

    def run() -> None:
        for step in range(12):
            switch(model, [step % 4])
            model(**batch(step)).loss.backward()
            optimizer.step()
            if step % 3 == 2:
                optimizer.zero_grad()

    return audited(model, optimizer, run)


@sound
def closures(_: Path, *, kind: type[torch.optim.Optimizer] = torch.optim.LBFGS, switches: bool = False) -> Audit:
    model = llama()
    optimizer = kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]

    def closure(step: int) -> float:
        optimizer.zero_grad()
        loss = model(**batch(step)).loss
        loss.backward()
        return loss.item()

    def run() -> None:
        for step in range(6):
            if switches:
                switch(model, [step % 4])
            optimizer.step(partial(closure, step))

    return audited(model, optimizer, run)


@sound
def closures_with_switching(path: Path) -> Audit:
    return closures(path, kind=torch.optim.SGD, switches=True)


@sound
def loss_scaler_skips_steps(_: Path) -> Audit:
    model = llama()
    optimizer = adamw(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def run() -> None:
        for step in range(4):
            switch(model, [step])
            loss = scaler.scale(model(**batch(step)).loss)
            loss.backward()
            if step in (0, 3):
                model.lm_head.weight.grad.fill_(float("inf"))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    return audited(model, optimizer, run)


@sound
def steps_with_infinite_gradients_are_skipped_inside(_: Path) -> Audit:
    class Skips(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            graded = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            return super().step(closure) if all(g.isfinite().all() for g in graded) else None

    model = llama()
    optimizer = Skips(model.parameters(), lr=1e-2)

    def run() -> None:
        for step in range(4):
            switch(model, [step])
            model(**batch(step)).loss.backward()
            if step == 3:
                model.lm_head.weight.grad.fill_(float("inf"))
            optimizer.step()
            optimizer.zero_grad()

    return audited(model, optimizer, run)


class Lookahead(torch.optim.Optimizer):
    """Every third step, weights go back half the way to where they were (Zhang et al. 2019)."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.calls = inner, 0
        super().__init__(inner.param_groups, {})
        self.slow = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.inner.step()
        self.calls += 1
        if self.calls % 5 == 0:
            for p, slow in self.slow.items():
                p.copy_(slow.lerp_(p, 0.5))


@sound
def an_optimizer_around_another(_: Path, *, inner_given: bool = False) -> Audit:
    model = llama()
    optimizer = Lookahead(adamw(model.parameters()))
    return audited(model, optimizer.inner if inner_given else optimizer, lambda: lisa(model, optimizer))


@sound
def only_the_inner_optimizer_given(path: Path) -> Audit:
    return an_optimizer_around_another(path, inner_given=True)


@sound
def an_optimizer_that_chooses_by_itself(_: Path) -> Audit:
    """All layers get gradients at all times, and it updates one of them: the audit ends before all had their turn."""

    class Chooses(torch.optim.SGD):
        calls = 0

        def step(self, closure: Any = None) -> Any:
            for number, layer in enumerate(model.model.layers):
                if number != self.calls % 4:
                    for p in layer.parameters():
                        p.grad = None
            self.calls += 1
            return super().step(closure)

    model = llama()
    optimizer = Chooses(model.parameters(), lr=0.1)

    def run() -> None:
        for step in range(2):
            model(**batch(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return audited(model, optimizer, run)


@sound
def no_backward_at_all(_: Path) -> Audit:
    """MeZO: the weights are frozen for autograd, and the optimizer estimates slopes from losses."""

    class Zeroth(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)), alpha=-group["lr"])

    model = llama().requires_grad_(False)
    optimizer = Zeroth(model.parameters(), {"lr": 1e-3})
    return audited(model, optimizer, lambda: [optimizer.step() for _ in range(3)])


@sound
def gradients_set_by_hand(_: Path) -> Audit:
    """Evolution strategies, federated updates: no backward pass makes the gradient, and flags are all off."""
    model = llama().requires_grad_(False)
    optimizer = adamw(model.parameters())

    def run() -> None:
        for _ in range(4):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
            optimizer.zero_grad()

    return audited(model, optimizer, run)
