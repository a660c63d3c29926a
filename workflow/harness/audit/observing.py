"""Observes any training from outside, through the hooks that every torch optimizer has."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from transformers import TrainerCallback

from grass.layers import find_layers
from harness.audit.facts import Facts, StateBytes
from harness.audit.facts import Tensor as Seen
from harness.audit.judging import report
from harness.measuring.census import fingerprint, storage_bytes


class Audit:
    """Watches `optimizer` train `model`, and prints a table with verdicts when the block ends.

    An interval is a sequence of at most `interval_steps` steps in which the same parameters require gradients. The bits
    of every parameter are compared between its start and its end (one pass over the weights each); in between only
    flags and learning rates are read. Training itself is not affected: no weight, gradient or random number changes.

    Args:
        model: with decoder layers that `grass.find_layers` finds; adapters inside a layer belong to that layer.
        optimizer: the optimizer whose `step` is called; a wrapper (accelerate) is replaced by its `.optimizer`.
        interval_steps: longest interval.
        quiet: keep the report for `report()`, print nothing.

    Raises:
        ValueError: no decoder layers are found, or `optimizer` is not a torch optimizer.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, interval_steps: int = 50, quiet: bool = False
    ) -> None:
        if interval_steps < 1:
            raise ValueError(f"interval_steps must be at least 1, not {interval_steps}")
        # accelerate's wrapper is an Optimizer too, but calls the inner one's `step`
        inner = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(inner, torch.optim.Optimizer):
            raise ValueError(f"optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer")
        self.optimizer, self.interval_steps, self.quiet = inner, interval_steps, quiet
        self._parameters = dict(model.named_parameters())
        layers = find_layers(model)
        parts = {id(p): part for part, parameters in layers.outside.items() for p in parameters}
        for number, parameters in enumerate(layers.layer_parameters()):
            parts |= {id(p): f"layer {number}" for p in parameters}
        self.facts = Facts(type(model).__name__, type(inner).__name__, len(layers.layers))
        for name, p in self._parameters.items():
            coarse = p.element_size() == 2 and p.dim() == 1
            self.facts.tensors[name] = Seen(parts[id(p)], p.numel(), coarse)
        self._hooks: list[Any] = []
        self._on: frozenset[str] | None = None
        self._graded: frozenset[str] = frozenset()
        self._began = 0
        self._rate_seen = False
        self._marks: dict[str, tuple[int, ...]] = {}

    def __enter__(self) -> Self:
        self._marks = self._fingerprints()
        self._hooks = [
            self.optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            self.optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._end_interval()
        if not self.quiet:
            print(self.report())

    def report(self) -> str:
        """The table and the verdicts, as text."""
        return report(self.facts)

    # ------------------------------------------------------------ at every step

    def _before_step(self) -> None:
        facts = self.facts
        on = frozenset(name for name, p in self._parameters.items() if p.requires_grad)
        if on != self._on or facts.steps - self._began >= self.interval_steps:
            self._end_interval()
            self._begin_interval(on)
        groups = self.optimizer.param_groups
        rates = [float(group["lr"]) for group in groups]
        facts.rates.append(rates)
        self._rate_seen |= any(rate > 0 for rate in rates)
        names = {id(p): name for name, p in self._parameters.items()}
        held = [[names[id(p)] for p in group["params"] if id(p) in names] for group in groups]
        for name in (name for group in held for name in group):
            facts.tensors[name].in_optimizer = True
        known = facts.parts()
        facts.group_parts = [sorted({facts.tensors[n].part for n in group}, key=known.index) for group in held]

    def _after_step(self) -> None:
        self.facts.steps += 1
        if self.facts.steps - 1 == self._began:
            self.facts.state.append(self._state_bytes())

    # ------------------------------------------------------------ at the ends of an interval

    def _begin_interval(self, on: frozenset[str]) -> None:
        facts = self.facts
        self._on, self._began, self._rate_seen = on, facts.steps, False
        facts.intervals += 1
        facts.sets.append(frozenset(facts.tensors[name].part for name in on))
        alive = {name for name, p in self._parameters.items() if p.grad is not None}
        for name in alive - on:
            facts.tensors[name].stale_gradients += 1
        for name in on:
            facts.tensors[name].on += 1
            facts.tensors[name].graded += name in alive
        # with zero moments, Adam does not move a parameter whose gradient is zero: that is not the optimizer's fault
        self._graded = frozenset(n for n in alive & on if self._parameters[n].grad.count_nonzero() > 0)  # type: ignore[union-attr]

    def _end_interval(self) -> None:
        if self._on is None:
            return
        now = self._fingerprints()
        moved = {name for name, mark in now.items() if mark != self._marks[name]}
        self._marks = now
        for name, tensor in self.facts.tensors.items():
            if name in self._on:
                tensor.moved += name in moved
                tensor.on_with_rate += name in self._graded and self._rate_seen
            else:
                tensor.moved_off += name in moved
        self._on = None

    def _fingerprints(self) -> dict[str, tuple[int, ...]]:
        return {name: fingerprint([p]) for name, p in self._parameters.items()}

    def _state_bytes(self) -> StateBytes:
        """Bytes of tensors in the optimizer's state, and of its group parameters that are copies of the model's."""
        own = {id(p) for p in self._parameters.values()}
        total: dict[int, int] = {}
        sleeping = 0
        # BAdam's optimizer, for one, keeps all its state in an inner optimizer
        for optimizer in (self.optimizer, *filter(_is_optimizer, vars(self.optimizer).values())):
            groups = (p for group in optimizer.param_groups for p in group["params"])
            total |= storage_bytes(p for p in groups if id(p) not in own)
            for parameter, state in optimizer.state.items():
                held = [v for v in state.values() if isinstance(v, torch.Tensor) and v.dim() > 0]
                total |= storage_bytes(held)
                if id(parameter) in own and not parameter.requires_grad:
                    sleeping += sum(storage_bytes(v for v in held if v.device == parameter.device).values())
        return StateBytes(self.facts.steps, sum(total.values()), sleeping)


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, torch.optim.Optimizer)


class AuditCallback(TrainerCallback):  # type: ignore[misc]
    """`Audit` in a `transformers.Trainer`: put it after the callback that switches layers; it prints at the end."""

    def __init__(self, *, interval_steps: int = 50) -> None:
        self.interval_steps = interval_steps
        self.audit: Audit | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Trainer has built its optimizer by now."""
        self.audit = Audit(given["model"], given["optimizer"], interval_steps=self.interval_steps).__enter__()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Print the report."""
        if self.audit is not None:
            self.audit.__exit__(None, None, None)
