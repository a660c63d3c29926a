"""Full fine-tuning: AdamW on every parameter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from baselines.method import Expectation, Method, ModelFacts, adamw, moment_bytes

if TYPE_CHECKING:
    from torch import nn


class Full(Method):
    """Every parameter trains at every step."""

    RANKS = True
    ADAMW = True

    def attach(self, model: nn.Module) -> nn.Module:
        """Make every parameter trainable."""
        self.model = model.requires_grad_(True)
        self.optimizer = adamw(list(model.parameters()), self.recipe, self.lr, seed=self.seed)
        return model

    def expect(self, facts: ModelFacts) -> Expectation:
        """Everything moves and has state."""
        return Expectation(
            layers="all",
            embedding=True,
            head=True,
            final_norm=True,
            trainable_parameters=facts.total_parameters,
            state_bytes_per_parameter=moment_bytes(self.recipe),
            state_in_8_bits=self.recipe.state_dtype == "int8",
            state_of="active",
        )
