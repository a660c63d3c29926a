"""State of layer sampling: mean gradient norms, how training refreshes them, and the draws they lead to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grass.host import current
from grass.importance import Importance, effective_layers
from grass.options import Options
from grass.sampling import LayerSampler, warn_if_not_adaptive


class Belief:
    """Layer importance and the sampler that draws layers by it.

    Args:
        options: the run's options.
        layers: number of decoder layers.
    """

    def __init__(self, options: Options, layers: int) -> None:
        self._options = options
        self.sampler = LayerSampler(
            options.sampler, layers=layers, active_layers=options.active_layers, seed=options.seed
        )
        self.importance: Importance | None = None
        """None before probing, and always None with a sampler that measures nothing."""
        self._warned = False
        self._window: dict[int, tuple[Tensor, int]] = {}
        """By layer: the sum of r over its active steps since the last refresh, and the number of these steps."""

    @property
    def effective_layers(self) -> float:
        """exp(H(p)) of the current probabilities."""
        return effective_layers(self.sampler.probability)

    def start(self, means: Sequence[float]) -> None:
        """Set importance from a probe of all layers.

        Raises:
            ValueError: a mean gradient norm that is not finite.
        """
        self.importance = Importance.from_probe(means)
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
            measured = dict(enumerate(probed))
        elif self._window:
            means = torch.stack([total / count for total, count in self._window.values()])
            measured = dict(zip(self._window, current().numbers(means), strict=True))
        self.importance.refresh(measured, ema=self._options.ema, step=steps)
        self._window = {}
        self._follow()
        self._warn_once(f"after {steps} steps")

    def _warn_once(self, when: str) -> None:
        if not self._warned:
            self._warned = warn_if_not_adaptive(self.sampler, self.effective_layers, when=when)

    def _follow(self) -> None:
        """Recompute the sampler's probabilities from importance."""
        assert self.importance is not None
        options = self._options
        self.sampler.follow(self.importance.values, temperature=options.temperature, norm=options.norm)

    def state_dict(self) -> dict[str, Any]:
        """Everything that later draws depend on."""
        values = self.importance
        return {
            "importance": None if values is None else (list(values.values), list(values.measured_at)),
            "window": {layer: (total.clone(), steps) for layer, (total, steps) in self._window.items()},
            "sampler": self.sampler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Inverse of `state_dict`; the window goes to `device`."""
        values = state["importance"]
        self.importance = None if values is None else Importance(*(list(part) for part in values))
        self._window = {
            int(layer): (total.to(device, copy=True), steps) for layer, (total, steps) in state["window"].items()
        }
        self.sampler.load_state_dict(state["sampler"])
