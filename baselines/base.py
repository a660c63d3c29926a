"""The untuned model: no step is taken. It is the reference row for all others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from baselines.method import Expectation, Method, ModelFacts

if TYPE_CHECKING:
    from torch import nn


class Base(Method):
    """No training at all."""

    TRAINS = False

    def attach(self, model: nn.Module) -> nn.Module:
        """Leave the model as it is."""
        self.model = model
        return model

    def expect(self, facts: ModelFacts) -> Expectation:
        """Nothing moves and no state exists."""
        return Expectation(layers="none", trainable_parameters=0, state_bytes_per_parameter=0, state_of="none")
