"""What did the method do? Facts observed independently of the method, for `harness.training.verdict` to judge.

At the start and end of every period the harness fingerprints the weights of each decoder layer and of each group
outside the stack. Just before the first update of a period it checks which gradients exist; just after it, it counts
the live tensors.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

from torch import nn

from baselines.method import LayerTrace
from grass.layers import LayerMap
from harness.measuring.census import begin_census, fingerprint, live_bytes_outside

GROUPS = ("embedding", "final_norm", "head")
NAMED = 3
"""Parameters without a gradient that are named."""


@dataclass
class Period:
    """Observations from the first step of a period to its last."""

    first_step: int
    last_step: int = -1
    moved_layers: list[int] = field(default_factory=list)
    moved_base: list[int] = field(default_factory=list)
    """Layers whose own weights moved, adapters left out."""
    moved_groups: list[str] = field(default_factory=list)
    moved_base_groups: list[str] = field(default_factory=list)
    """Groups outside the layers whose own weights moved, adapters left out."""
    graded_layers: list[int] = field(default_factory=list)
    graded_groups: list[str] = field(default_factory=list)
    graded_parameters: int = 0
    """Parameters that had a gradient just before the period's first update."""
    ungraded: list[str] = field(default_factory=list)
    """Names of some parameters that required a gradient then, and had none."""
    moved_tensors: list[str] = field(default_factory=list)
    """Names of the model's own tensors that moved; kept only where the method names tensors."""
    graded_tensors: list[str] = field(default_factory=list)
    state_bytes: int = 0
    believed_tensors: list[str] | None = None
    believed_active: list[int] | None = None
    believed_probability: list[float] | None = None


class Watch:
    """Observes the model from outside. Create it before `attach`, call `attached` after."""

    def __init__(self, model: nn.Module, layers: LayerMap) -> None:
        self._layers = layers
        self._base = [list(parameters) for parameters in layers.layer_parameters()]
        self._groups = {key: list(layers.outside[key]) for key in GROUPS}
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._model = model
        self._marks: dict[str, Any] = {}
        begin_census()
        self.periods: list[Period] = []

    def attached(self, model: nn.Module) -> None:
        """Observe `model` (perhaps wrapped), the module that trains.

        Adapters inside a layer belong to that layer, others to the group whose weights they share a module with.
        """
        self._model = model
        own = {id(p) for p in self._own()}
        self._adapters = [[p for p in layer.parameters() if id(p) not in own] for layer in self._layers.layers]
        inside = {id(p) for parameters in self._adapters for p in parameters}
        key_of = {id(p): key for key, parameters in self._groups.items() for p in parameters}
        found: dict[int, str] = {}
        for module in model.modules():  # outer modules come before those inside them
            here = {id(p): p for p in module.parameters()}
            keys = {key_of[i] for i in here.keys() & key_of.keys()}
            if len(keys) == 1:
                found |= dict.fromkeys(here.keys() - own - inside, keys.pop())
        self._group_adapters = {key: [p for p in model.parameters() if found.get(id(p)) == key] for key in self._groups}

    def start_period(self, step: int, trace: LayerTrace | None) -> None:
        """Call before the first forward pass of `step`, after the method's own `begin_step`."""
        period = Period(first_step=step)
        if trace is not None:
            period.believed_active = list(trace.active)
            period.believed_tensors = None if trace.tensors is None else sorted(trace.tensors)
            period.believed_probability = None if trace.probability is None else list(trace.probability)
        self.periods.append(period)
        self._marks = self._fingerprints()

    def before_update(self) -> None:
        """Call after the last backward of the period's first step: records which gradients exist."""
        period = self.periods[-1]
        for layer, (base, adapters) in enumerate(zip(self._base, self._adapters, strict=True)):
            graded = [p for p in [*base, *adapters] if p.grad is not None]
            if graded:
                period.graded_layers.append(layer)
            period.graded_parameters += sum(p.numel() for p in graded)
        for key, parameters in self._groups.items():
            graded = [p for p in [*parameters, *self._group_adapters[key]] if p.grad is not None]
            if graded:
                period.graded_groups.append(key)
            period.graded_parameters += sum(p.numel() for p in graded)
        ungraded = (name for name, p in self._model.named_parameters() if p.requires_grad and p.grad is None)
        period.ungraded = list(islice(ungraded, NAMED))
        if period.believed_tensors is not None:
            period.graded_tensors = sorted(self._names[id(p)] for p in self._own() if p.grad is not None)

    def after_update(self) -> None:
        """Call after the period's first update: records the bytes alive besides the model."""
        self.periods[-1].state_bytes = live_bytes_outside(self._model)

    def end_period(self, step: int) -> None:
        """Call after the last update of the period, that of `step`: records what moved."""
        period, now = self.periods[-1], self._fingerprints()
        period.last_step = step
        # the resume state of an older version may not have all of them
        moved = {key for key, mark in self._marks.items() if now[key] != mark}
        layers = range(len(self._base))
        period.moved_base = [i for i in layers if f"base {i}" in moved]
        period.moved_layers = [i for i in layers if {f"base {i}", f"adapter {i}"} & moved]
        period.moved_base_groups = [key for key in GROUPS if key in moved]
        period.moved_groups = [key for key in GROUPS if {key, f"adapter {key}"} & moved]
        if period.believed_tensors is not None:
            before = self._tensor_marks(self._marks)
            period.moved_tensors = sorted(n for n, mark in self._tensor_marks(now).items() if mark != before[n])

    def state_dict(self) -> dict[str, Any]:
        """For the resume state."""
        return {"periods": [asdict(p) for p in self.periods], "marks": self._marks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.periods = [Period(**p) for p in state["periods"]]
        self._marks = state["marks"]

    def _own(self) -> list[nn.Parameter]:
        return [p for parameters in (*self._base, *self._groups.values()) for p in parameters]

    def _tensor_marks(self, marks: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Fingerprints of single tensors, split from those of groups: two numbers per tensor, in order."""
        keys = [*(f"base {layer}" for layer in range(len(self._base))), *self._groups]
        numbers = [n for key in keys for n in marks[key]]
        return {self._names[id(p)]: tuple(numbers[2 * i : 2 * i + 2]) for i, p in enumerate(self._own())}

    def _fingerprints(self) -> dict[str, Any]:
        marks: dict[str, Any] = {key: fingerprint(parameters) for key, parameters in self._groups.items()}
        marks |= {f"adapter {key}": fingerprint(adapters) for key, adapters in self._group_adapters.items()}
        for layer, (base, adapters) in enumerate(zip(self._base, self._adapters, strict=True)):
            marks[f"base {layer}"], marks[f"adapter {layer}"] = fingerprint(base), fingerprint(adapters)
        return marks
