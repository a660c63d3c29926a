"""Observes any training from outside, through the hooks that torch has for all optimizers, modules and gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import TrainerCallback

from grass.backward import checkpointing_is_reentrant
from grass.layers import find_layers
from harness.audit.facts import Event, Facts, Group
from harness.audit.facts import Tensor as Seen
from harness.audit.gradients import Gradients, Looked, usable
from harness.audit.optimizers import family, held_by, listed, on_plateau, unwrapped, who_waits
from harness.audit.report import report
from harness.audit.rounds import Round, Tally
from harness.audit.state import Kept, kept_by, totals
from harness.measuring.census import fingerprint

Optimizers = torch.optim.Optimizer | Iterable[torch.optim.Optimizer]
Layers = str | Sequence[nn.Module]


class Audit:
    """Watches optimizers train `model`, and prints a table with verdicts when the block ends.

    The bits of every parameter that an optimizer holds are compared before and after each of its steps, so that what a
    step moved is told apart from what anything else wrote. Training itself is not affected: no weight, gradient or
    random number changes.

    An interval is a sequence of at most `interval_steps` steps in which the same parameters train.

    Args:
        model: with decoder layers that `grass.find_layers` finds; adapters inside a layer belong to that layer.
        optimizer: the optimizers that train the model; a wrapper (accelerate's) is replaced by its `.optimizer`.
        layers: as in `grass.find_layers`: the decoder layers, or their attribute path, if they cannot be found.
        interval_steps: longest interval.
        quiet: keep the report for `report()`, print nothing.

    Raises:
        ValueError: no decoder layers are found, or `optimizer` is not a torch optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers,
        *,
        layers: Layers | None = None,
        interval_steps: int = 50,
        quiet: bool = False,
    ) -> None:
        if interval_steps < 1:
            raise ValueError(f"interval_steps must be at least 1, not {interval_steps}")
        self.optimizers, self.quiet = unwrapped(optimizer), quiet
        self._model = model
        self._parameters = dict(model.named_parameters())
        self._names = {id(p): name for name, p in self._parameters.items()}
        found = find_layers(model, layers=layers)
        parts = {id(p): part for part, parameters in found.outside.items() for p in parameters}
        for number, parameters in enumerate(found.layer_parameters()):
            parts |= {id(p): f"layer {number}" for p in parameters}
        self.facts = Facts(type(model).__name__, listed(self.optimizers), len(found.layers))
        for name, p in self._parameters.items():
            coarse = p.element_size() == 2 and p.dim() == 1
            self.facts.tensors[name] = Seen(parts[id(p)], p.numel(), coarse)
        inner = [one for given in self.optimizers for one in family(given)]
        self._watched = list({id(one): one for one in (*self.optimizers, *inner)}.values())
        self._numbers = {id(one): number for number, one in enumerate(self._watched)}
        self._gradients = Gradients(self._parameters)
        self._tally = Tally(self.facts, interval_steps)
        self._round = Round()
        self._step: _Step | None = None
        self._groups: dict[tuple[int, int], Group] = {}
        self._kept: dict[int, dict[int, Kept]] = {}
        self._compared: set[str] = set()
        """Parameters that are compared at every step of some optimizer."""
        self._marks: dict[str, tuple[int, ...]] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> Self:
        self._changed(self._parameters)
        self._gradients.listen()
        self._hooks = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
            self._model.register_forward_pre_hook(lambda *_: self._gradients.forward_begins()),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._gradients.stop_listening()
        self._close_round()
        self._tally.end_interval()
        facts = self.facts
        facts.reentrant |= checkpointing_is_reentrant(self._model)
        # nobody knows what was written after the last step for (the best checkpoint, an average): it is left alone
        # unless a verdict hangs on it
        for name in self._changed(n for n, t in facts.tensors.items() if t.forgotten or not facts.steps):
            facts.tensors[name].written += 1
        forgotten = {name: self._parameters[name] for name, t in facts.tensors.items() if t.forgotten}
        for name, waiting in who_waits(forgotten, besides=self._numbers).items():
            facts.tensors[name].waiting = waiting
        if any(group.varies for group in facts.groups) and any(group.stays_unasked for group in facts.groups):
            governed = on_plateau()
            for group in facts.groups:
                group.scheduled |= id(self._watched[group.owner]) in governed
        if not self.quiet:
            print(self.report())

    def report(self) -> str:
        """The table and the verdicts, as text."""
        return report(self.facts)

    # ------------------------------------------------------------ at every step of any optimizer

    def _before(self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        if self._step is not None and self._step.optimizer is not optimizer:
            return  # a step within a watched step is part of it
        number = self._numbers.get(id(optimizer))
        if number is None:
            for name in self._held([optimizer]):
                self.facts.tensors[name].other = type(optimizer).__name__
            return
        if number in self._round.stepped:
            self._close_round()
        self._gradients.listen()
        held, copies = self._held(family(optimizer)), self._holds_copies(optimizer)
        free = [] if self._round.stepped else self._unheld()
        self._round.stepped.add(number)
        # whoever holds copies of the weights may move any of them
        step = _Step(optimizer, number, list(self._parameters) if copies else held, held, free)
        step.has_closure = any(callable(value) for value in (*args[1:], *given.values()))
        self._compared.update(step.compared)
        self._round.events["written"] |= self._changed(step.compared)
        if not step.has_closure:
            self._look(step)
        self._note_rates(optimizer, number)
        self._step = step

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        step = self._step
        if step is None or step.optimizer is not optimizer:
            return
        self._step = None
        if step.has_closure:  # its gradients were made within the step
            self._look(step)
        looked, events = step.looked, self._round.events
        changed = self._changed(step.compared)
        self._round.acted |= bool(changed)
        events["moved"] |= changed & looked.on
        events["dragged"] |= changed & looked.left_over
        events["moved_alone"] |= changed - looked.on - looked.left_over
        if changed:
            self._gradients.used({*step.compared, *step.free})
            events["idle"] |= {n for n in looked.on & step.rated - changed if self._should_move(n, known="idle")}
        events["pending"] |= {n for n in looked.on & set(step.free) if self._should_move(n, known="pending")}
        self._kept[step.number] = kept_by(family(step.optimizer), self._names)

    def _look(self, step: _Step) -> None:
        """Note which of the step's parameters are on, and their gradients."""
        step.looked = looked = self._gradients.look({*step.compared, *step.free})
        for group in (group for o in family(step.optimizer) for group in o.param_groups):
            if group.get("lr") is None or float(group["lr"]) > 0:
                step.rated.update(self._names[id(p)] for p in group["params"] if id(p) in self._names)
        events = self._round.events
        events["on"] |= looked.on
        events["graded"] |= looked.graded
        events["left_over"] |= looked.left_over
        events["set_by_hand"] |= looked.by_hand
        for name in step.held:
            self.facts.tensors[name].in_optimizer = True

    def _should_move(self, name: str, *, known: Event) -> bool:
        """Whether an update must change it; not asked again once it is known to move or not to."""
        tensor = self.facts.tensors[name]
        return not tensor.moved and not getattr(tensor, known) and usable(self._parameters[name].grad)

    def _note_rates(self, optimizer: torch.optim.Optimizer, number: int) -> None:
        for place, group in enumerate(optimizer.param_groups):
            if group.get("lr") is None:
                continue
            rate = float(group["lr"])
            known = self._groups.get((number, place))
            if known is None:
                known = self._groups[number, place] = Group(number, type(optimizer).__name__, place, rate, rate, rate)
                self.facts.groups.append(known)
            known.add(rate)
            known.scheduled = "initial_lr" in group
            names = (self._names[id(p)] for p in group["params"] if id(p) in self._names)
            known.parts = self.facts.in_order(self.facts.tensors[name].part for name in names)

    def _close_round(self) -> None:
        if not self._round.stepped:
            return
        if self._tally.add(self._round, totals(self._kept)):
            self.facts.reentrant |= checkpointing_is_reentrant(self._model)
            rest = self._changed(name for name in self._parameters if name not in self._compared)
            for name in rest:
                self.facts.tensors[name].written += 1
        self._round = Round()

    # ------------------------------------------------------------ small

    def _changed(self, names: Iterable[str]) -> set[str]:
        """Parameters whose bits differ from when they were last read."""
        wanted = list(names)
        numbers = fingerprint(self._parameters[name] for name in wanted)
        now = dict(zip(wanted, zip(numbers[::2], numbers[1::2], strict=True), strict=True))
        changed = {name for name, mark in now.items() if mark != self._marks.get(name, mark)}
        self._marks |= now
        return changed

    def _held(self, optimizers: Iterable[torch.optim.Optimizer]) -> list[str]:
        return list(dict.fromkeys(self._names[id(p)] for p in held_by(optimizers) if id(p) in self._names))

    def _holds_copies(self, optimizer: torch.optim.Optimizer) -> bool:
        return any(id(p) not in self._names for p in held_by(family(optimizer)))

    def _unheld(self) -> list[str]:
        held = set(self._held(self._watched))
        return [name for name in self._parameters if name not in held]


@dataclass
class _Step:
    """One step of a watched optimizer, while it lasts."""

    optimizer: torch.optim.Optimizer
    number: int
    compared: list[str]
    """Names of parameters that are compared before and after."""
    held: list[str]
    free: list[str]
    """Names that no watched optimizer holds, in the first step of a round."""
    has_closure: bool = False
    looked: Looked = field(default_factory=Looked)
    rated: set[str] = field(default_factory=set)
    """Held names whose rate is above 0."""


class AuditCallback(TrainerCallback):  # type: ignore[misc]
    """`Audit` in a `transformers.Trainer`: put it after the callback that switches layers; it prints at the end.

    Args:
        layers: as in `Audit`.
        interval_steps: as in `Audit`.
    """

    def __init__(self, *, layers: Layers | None = None, interval_steps: int = 50) -> None:
        self.layers, self.interval_steps = layers, interval_steps
        self.audit: Audit | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Trainer has built its optimizer by now."""
        settings: dict[str, Any] = {"layers": self.layers, "interval_steps": self.interval_steps}
        self.audit = Audit(given["model"], given["optimizer"], **settings).__enter__()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Print the report."""
        if self.audit is not None:
            self.audit.__exit__(None, None, None)
