"""LISA: layer-wise importance sampled AdamW, uniform draws (arXiv 2403.17919, NeurIPS 2024).

The paper's runs restarted every interval, so all moments of sampled layers were lost at each switch (`state: reset`,
the default); LMFlow's public callback never drops any (`state: keep`). These are two optimizers, so tables name the one
used. The authors' restart also lost the moments of embedding and head; `reset` here keeps those, as the fact sheets
recommend: that choice is ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from baselines.method import (
    Expectation,
    LayerTrace,
    Method,
    ModelFacts,
    Options,
    adamw,
    moment_bytes,
    tied_conflict,
)

if TYPE_CHECKING:
    from torch import nn

    from baselines.method import Recipe


class LisaOptions(Options):
    """LISA's block in the config."""

    active_layers: int = Field(default=2, gt=0, description="gamma; the paper uses 2 up to 7B")
    sample_every: int = Field(default=20, gt=0, description="K, steps between two draws; LMFlow's scripts use 20")
    state: Literal["reset", "keep"] = "reset"
    train_embedding: bool = True
    train_head: bool = True
    train_final_norm: bool = Field(default=True, description="LMFlow's code trains it, the paper does not name it")


class Lisa(Method):
    """Embedding, final norm and head train all along; `active_layers` decoder layers are drawn uniformly every K steps.

    The LISA paper names embedding and head only; LMFlow's code freezes nothing but the decoder layers, so the final
    norm trains too. We follow the code.
    """

    Config: ClassVar[type[Options]] = LisaOptions
    PAPER = "arXiv 2403.17919"
    ADAMW = True
    EXAMPLES: ClassVar[tuple[dict[str, Any], ...]] = (
        {"active_layers": 2, "sample_every": 3, "state": "reset"},
        {"active_layers": 2, "sample_every": 3, "state": "keep"},
        {
            "active_layers": 2,
            "sample_every": 3,
            "train_embedding": False,
            "train_head": False,
            "train_final_norm": False,
        },
    )
    options: LisaOptions

    def __init__(self, options: Options, *, recipe: Recipe, lr: float, seed: int) -> None:
        super().__init__(options, recipe=recipe, lr=lr, seed=seed)
        self.active: tuple[int, ...] = ()

    def skip(self, facts: ModelFacts) -> str | None:
        """Skip more active layers than exist, and a tied head of which only one of head and embedding trains."""
        if self.options.active_layers > facts.layers:
            return f"active_layers {self.options.active_layers} is above the model's {facts.layers} layers"
        return tied_conflict(facts, embedding=self.options.train_embedding, head=self.options.train_head)

    def attach(self, model: nn.Module) -> nn.Module:
        """Build the optimizer over everything *before* freezing: otherwise layers drawn later would never move."""
        import torch

        from grass.layers import find_layers, set_trainable

        self.model = model
        found = find_layers(model)
        self.layer_parameters = found.layer_parameters()
        self.generator = torch.Generator().manual_seed(self.seed)
        self.optimizer = adamw(list(model.parameters()), self.recipe, self.lr, seed=self.seed)
        set_trainable(found.outside["embedding"], self.options.train_embedding)
        set_trainable(found.outside["head"], self.options.train_head)
        set_trainable(found.outside["final_norm"], self.options.train_final_norm)
        return model

    def begin_step(self, step: int) -> None:
        """Draw at step 0 and every `sample_every` steps (LMFlow: at on_step_begin)."""
        from grass.sampling import draw_layers

        if step % self.options.sample_every == 0:
            count = len(self.layer_parameters)
            self.active = draw_layers([1 / count] * count, self.options.active_layers, self.generator)
            if self.options.state == "reset":
                self._forget_moments()
            self._freeze()

    def trace(self) -> LayerTrace:
        """Only the draw: LISA has no importance."""
        return LayerTrace(active=self.active)

    def expect(self, facts: ModelFacts) -> Expectation:
        """Drawn layers move in their period; with `reset`, sleeping layers have no state."""
        largest = sorted(facts.layer_parameters)[-self.options.active_layers :]
        options = self.options
        outside = facts.outside_parameters(
            embedding=options.train_embedding, head=options.train_head, final_norm=options.train_final_norm
        )
        return Expectation(
            layers="sampled",
            active_layers=self.options.active_layers,
            period_steps=self.options.sample_every,
            embedding=options.train_embedding,
            head=options.train_head,
            final_norm=options.train_final_norm,
            trainable_parameters=sum(largest) + outside,
            state_bytes_per_parameter=moment_bytes(self.recipe),
            state_in_8_bits=self.recipe.state_dtype == "int8",
            state_of="active" if self.options.state == "reset" else "visited",
        )

    def state_dict(self) -> dict[str, Any]:
        """Moments, the drawn layers and the generator."""
        return {**super().state_dict(), "active": self.active, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; freezes again."""
        super().load_state_dict(state)
        self.active = tuple(state["active"])
        self.generator.set_state(state["generator"])
        self._freeze()

    def _freeze(self) -> None:
        from grass.layers import set_trainable

        for layer, parameters in enumerate(self.layer_parameters):
            set_trainable(parameters, layer in self.active)

    def _forget_moments(self) -> None:
        assert self.optimizer is not None
        for parameters in self.layer_parameters:
            for parameter in parameters:
                self.optimizer.state.pop(parameter, None)
