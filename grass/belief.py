"""State of layer sampling: mean gradient norms, how training refreshes them, and the draws they lead to."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grass.host import current
from grass.importance import Importance, effective_layers, temperature_for
from grass.options import Options
from grass.sampling import BY_TEMPERATURE, LayerSampler, warn_if_not_adaptive


class Belief:
    """Layer importance and the sampler that draws layers by it.

    Args:
        options: the run's options.
        layers: number of decoder layers.
        frozen: numbers of those that the user froze: they have no importance, and the sampler never sees them.
    """

    def __init__(self, options: Options, layers: int, *, frozen: Collection[int] = ()) -> None:
        self._options = options
        self._layers = layers
        self.drawable = [layer for layer in range(layers) if layer not in frozen]
        """Numbers of the layers that can be drawn."""
        self.sampler = LayerSampler(
            options.sampler, layers=len(self.drawable), active_layers=options.active_layers, seed=options.seed
        )
        """It numbers the drawable layers alone."""
        self.importance: Importance | None = None
        """None before probing, and always None with a sampler that measures nothing."""
        self.temperature: float | None = None
        """Tau in use, infinite if draws are uniform; None before probing, and with a sampler that uses none."""
        self._warned = False
        self._window: dict[int, tuple[Tensor, int]] = {}
        """By layer: the sum of r over its active steps since the last refresh, and the number of these steps."""

    @property
    def probability(self) -> list[float]:
        """P of the next single draw, one entry per decoder layer; 0 for frozen ones."""
        full = [0.0] * self._layers
        for layer, p in zip(self.drawable, self.sampler.probability, strict=True):
            full[layer] = p
        return full

    def draw(self, *, steps: int, trained: Sequence[int]) -> tuple[int, ...]:
        """The next active set, ascending; for the arguments see `LayerSampler.draw`."""
        places = self.sampler.draw(steps=steps, trained=[self.drawable.index(layer) for layer in trained])
        return tuple(self.drawable[place] for place in places)

    @property
    def effective_layers(self) -> float:
        """exp(H(p)) of the current probabilities."""
        return effective_layers(self.sampler.probability)

    def start(self, means: Sequence[float]) -> None:
        """Set importance from a probe of all layers; what it says of frozen ones is ignored.

        Raises:
            ValueError: a mean gradient norm that is not finite.
        """
        self.importance = Importance.from_probe(means)
        for layer in set(range(self._layers)).difference(self.drawable):
            self.importance.values[layer] = math.nan
        self._follow()
        self._warn_once("after probing")

    def note(self, measured: Mapping[int, Tensor]) -> None:
        """Add one step's r of every active layer (scalars on the device) to the window."""
        if self.sampler.refreshes:
            for layer, r in measured.items():
                total, steps = self._window.get(layer, (torch.zeros_like(r), 0))
                self._window[layer] = (total + r, steps + 1)

    def refresh(self, *, steps: int, probed: Sequence[float] | None = None) -> None:
        """Blend the window's measurements into m, then recompute p (paper, refresh).

        Args:
            steps: optimizer steps done so far.
            probed: mean gradient norms from a new probe of all layers, used instead of the window.
        """
        assert self.importance is not None
        measured: dict[int, float] = {}
        if probed is not None:
            measured = {layer: probed[layer] for layer in self.drawable}
        elif self._window:
            means = torch.stack([total / count for total, count in self._window.values()])
            measured = dict(zip(self._window, current().numbers(means), strict=True))
        self.importance.refresh(measured, ema=self._options.ema, step=steps)
        self._window = {}
        self._follow()
        self._warn_once(f"after {steps} steps")

    def _warn_once(self, when: str) -> None:
        if not self._warned:
            target = self._options.target if self._options.temperature == "auto" else None
            self._warned = warn_if_not_adaptive(self.sampler, self.effective_layers, target=target, when=when)

    def _follow(self) -> None:
        """Recompute the sampler's probabilities from importance.

        Under `temperature="auto"` tau is solved anew each time. A tau held since the probe would not do: as norms fall
        where layers train, values that were apart come together, and draws drift to uniform ones; where norms rise,
        the layers that trained pull away, and draws collapse. The price is that a real change of how far layers are
        apart does not change how sharply they are drawn.
        """
        assert self.importance is not None
        options, layers = self._options, self.sampler.layers
        values = [self.importance.values[layer] for layer in self.drawable]
        tau = math.inf
        if self.sampler.kind in BY_TEMPERATURE:
            tau = self.temperature = (
                temperature_for(
                    values,
                    effective=options.wanted_layers(layers),
                    norm=options.norm,
                    inverse=self.sampler.kind == "inverse",
                )
                if options.temperature == "auto"
                else options.temperature
            )
        self.sampler.follow(values, temperature=tau, norm=options.norm)

    def state_dict(self) -> dict[str, Any]:
        """Everything that later draws depend on."""
        values = self.importance
        return {
            "importance": None if values is None else (list(values.values), list(values.measured_at)),
            "window": {layer: (total.clone(), steps) for layer, (total, steps) in self._window.items()},
            "sampler": self.sampler.state_dict(),
            "temperature": self.temperature,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Inverse of `state_dict`; the window goes to `device`.

        Raises:
            ValueError: saved before `temperature="auto"` existed, and this run has it: it would go on otherwise.
        """
        values = state["importance"]
        tau = None
        if values is not None and self.sampler.kind in BY_TEMPERATURE:
            tau = state.get("temperature", self._options.temperature)
            if tau == "auto":
                raise ValueError(
                    "this state was saved by a version without temperature='auto': build Grass with that run's own "
                    "temperature, a number (1.0 where it set none)"
                )
        self.temperature = tau
        self.importance = None if values is None else Importance(*(list(part) for part in values))
        self._window = {
            int(layer): (total.to(device, copy=True), steps) for layer, (total, steps) in state["window"].items()
        }
        self.sampler.load_state_dict(state["sampler"])
