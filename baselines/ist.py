"""IST: importance-aware sparse tuning (arXiv 2410.11772, EMNLP 2024 Findings): learns which layers' adapters train.

It is a schedule on top of LoRA. Every step draws a quarter of the decoder layers, without replacement, with weights
sigmoid(-s); only their adapters get gradients. Every 10 steps, three sets of half of the layers are drawn with weights
sigmoid(s), and one set after the other has its adapters scaled down to a quarter. The losses of one batch give rewards
R = exp(-loss), and the score s of the layers in a set rises if its reward was above the mean. So s measures
*un*importance: a high score means that a layer's adapters can be scaled down at no cost. `trace` gives -s as
importance.

All this is from the authors' code (antgroup/importance-aware-sparse-tuning-IST-paper, ist.py). `choice: uniform` is its
control, RST, whose own file is not public: our reading is the same draw with equal weights.

Ours: the batch for a reward has the recipe's batch size and consists of calibration rows. The authors use 16 training
rows in a separately shuffled order. Ours are training rows too, in their own order, but are not taken from training,
which still sees all of its rows. The loss of several micro-batches is their mean. At least one layer trains (in the
code, a quarter of three layers is none). Scores are Python floats, so float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from baselines.lora import Lora, LoraOptions
from baselines.method import Expectation, LayerTrace, ModelFacts, host_number, moment_bytes

if TYPE_CHECKING:
    from torch import nn

    from baselines.method import Batch, Recipe

SETS = 3
"""Suppressed sets per measurement; the code's `rl_step`."""
SUPPRESSED_SHARE = 0.5
SUPPRESSION = 0.25
"""Factor of the adapters' scale in a suppressed layer; the code's `response_suppression_factor`."""
SCORE_RATE = 10.0
"""The code's `rl_lr`."""
REDRAWS = 100
"""Most attempts to draw a set that differs from the earlier ones. The code has no limit. A repeated set does no harm,
and is unavoidable if every draw has the same fixed result (a memory forecast)."""


class IstOptions(LoraOptions):
    """IST's block in the config: LoRA's, and which layers train."""

    choice: Literal["importance", "uniform"] = "importance"
    active_share: float = Field(
        default=0.25, gt=0, le=1, description="share of the layers that train in a step, rounded down; the code's 0.25"
    )
    measure_every: int = Field(default=10, gt=0, description="steps between two updates of the scores; the code's 10")


class Ist(Lora):
    """LoRA in which only a few layers train at a time; moments of sleeping adapters are kept, as in the code."""

    Config = IstOptions
    RANKS = False
    PAPER = "arXiv 2410.11772"
    EXAMPLES: ClassVar[tuple[dict[str, Any], ...]] = (
        {"rank": 4, "alpha": 8, "measure_every": 4},
        {"rank": 4, "alpha": 8, "choice": "uniform"},
        {"rank": 4, "alpha": 8, "measure_every": 3, "active_share": 0.5, "dropout": 0.1},
    )
    options: IstOptions

    def __init__(self, options: IstOptions, *, recipe: Recipe, lr: float, seed: int) -> None:
        super().__init__(options, recipe=recipe, lr=lr, seed=seed)
        self.active: tuple[int, ...] = ()
        self.scores: list[float] = []
        """s of every decoder layer; high means that it can be suppressed."""
        self.step = 0
        self.measured_at: int | None = None
        """Step of the last measurement."""
        self._batches: Iterator[Batch] | None = None

    def skip(self, facts: ModelFacts) -> str | None:
        """Skip for LoRA's reasons, or if there are too few layers for three distinct halves."""
        if facts.layers < SETS:
            return f"{facts.layers} layers have fewer than {SETS} distinct halves to suppress"
        return super().skip(facts)

    def attach(self, model: nn.Module) -> nn.Module:
        """Attach LoRA with an optimizer over all adapters, which are frozen only after it is built."""
        import torch
        from peft.tuners.lora import LoraLayer

        from grass.layers import find_layers

        layers = find_layers(model).layers
        wrapped = super().attach(model)
        if self.adapted_groups:
            raise ValueError("targets: IST draws decoder layers, and embedding and head are in none: name neither")
        self.adapters = [[p for p in layer.parameters() if p.requires_grad] for layer in layers]
        self.scalings = [[m.scaling for m in layer.modules() if isinstance(m, LoraLayer)] for layer in layers]
        """For every layer, the scales of its adapters: dictionaries by adapter name, which peft reads."""
        self.scores = [0.0] * len(layers)
        self.generator = torch.Generator().manual_seed(self.seed)
        return wrapped

    def begin_step(self, step: int) -> None:
        """Measure at every `measure_every`-th step but the first, then draw (the code: at on_step_begin)."""
        from grass.backward import stop_at_lowest_layer
        from grass.sampling import draw_layers

        self.step = step
        if self.options.choice == "importance" and step > 0 and step % self.options.measure_every == 0:
            self._measure()
        self.active = draw_layers(self.probability, self._active_layers, self.generator)
        self._freeze()
        # the model's own embedding never trains, but peft registers the hook that makes backward visit every layer
        stop_at_lowest_layer(self.wrapped)

    @property
    def probability(self) -> list[float]:
        """Probability of each layer in the next single draw; they sum to 1."""
        weights = [_sigmoid(-s) for s in self.scores]
        return [w / math.fsum(weights) for w in weights]

    def trace(self) -> LayerTrace:
        """Importance is -s, unknown before the first measurement."""
        known = self.measured_at is not None
        return LayerTrace(
            active=self.active,
            importance=tuple(-s for s in self.scores) if known else None,
            probability=tuple(self.probability),
            age_steps=None if self.measured_at is None else (self.step - self.measured_at,) * len(self.scores),
        )

    def expect(self, facts: ModelFacts) -> Expectation:
        """Adapters of the drawn layers move; every layer visited so far has state."""
        sizes = [sum(p.numel() for p in adapters) for adapters in self.adapters]
        return Expectation(
            layers="sampled",
            active_layers=self._active_layers,
            period_steps=1,
            base_frozen=True,
            trainable_parameters=sum(sorted(sizes)[-self._active_layers :]),
            layer_trained_parameters=tuple(sizes),
            state_bytes_per_parameter=moment_bytes(self.recipe),
            layer_state_bytes=tuple(size * moment_bytes(self.recipe) for size in sizes),
            state_of="visited",
        )

    def state_dict(self) -> dict[str, Any]:
        """Moments, scores, the drawn layers and the generator."""
        own = {"active": self.active, "scores": self.scores, "step": self.step, "measured_at": self.measured_at}
        return {**super().state_dict(), **own, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; freezes again."""
        super().load_state_dict(state)
        self.active, self.scores = tuple(state["active"]), list(state["scores"])
        self.step, self.measured_at = state["step"], state["measured_at"]
        self.generator.set_state(state["generator"])
        self._batches = None
        self._freeze()

    @property
    def _active_layers(self) -> int:
        return max(1, int(len(self.scores) * self.options.active_share))

    def _freeze(self) -> None:
        from grass.layers import set_trainable

        for layer, adapters in enumerate(self.adapters):
            set_trainable(adapters, layer in self.active)

    def _measure(self) -> None:
        """Update the scores by one batch's loss with each set suppressed, in evaluation mode without gradients."""
        import torch

        assert self.calibration is not None
        batches, sets = self._next_batches(), self._suppressed_sets()
        losses = []
        training = self.wrapped.training
        self.wrapped.eval()
        try:
            with torch.no_grad():
                for chosen in sets:
                    with self._suppressed(chosen):
                        values = [host_number(self.calibration.loss(self.wrapped, batch)) for batch in batches]
                    losses.append(math.fsum(values) / len(values))
        finally:
            self.wrapped.train(training)
        self.scores = rewarded(self.scores, sets, losses)
        self.measured_at = self.step

    def _next_batches(self) -> list[Batch]:
        """A batch of the recipe's size, in micro-batches; no row is repeated before all were used."""
        each, every = self.recipe.accumulation_steps, self.options.measure_every
        if self._batches is None:
            assert self.calibration is not None
            used = (self.measured_at or 0) // every * each
            self._batches = islice(self.calibration.batches(self.recipe.steps // every * each), used, None)
        return list(islice(self._batches, each))

    def _suppressed_sets(self) -> list[tuple[int, ...]]:
        """Distinct sets of half of the layers, drawn with weights sigmoid(s)."""
        from grass.sampling import draw_layers

        weights, count = [_sigmoid(s) for s in self.scores], int(len(self.scores) * SUPPRESSED_SHARE)
        sets: list[tuple[int, ...]] = []
        for _ in range(SETS):
            chosen = draw_layers(weights, count, self.generator)
            for _ in range(REDRAWS):
                if chosen not in sets:
                    break
                chosen = draw_layers(weights, count, self.generator)
            sets.append(chosen)
        return sets

    @contextmanager
    def _suppressed(self, layers: Sequence[int]) -> Iterator[None]:
        """Scale the adapters of `layers` down to a quarter; afterwards restore their scales bit for bit."""
        before = [(scaling, dict(scaling)) for layer in layers for scaling in self.scalings[layer]]
        try:
            for scaling, own in before:
                scaling.update({name: scale * SUPPRESSION for name, scale in own.items()})
            yield
        finally:
            for scaling, own in before:
                scaling.update(own)


def rewarded(scores: Sequence[float], sets: Sequence[Sequence[int]], losses: Sequence[float]) -> list[float]:
    """Scores after one measurement: s += 10 (R_k - mean R) sigmoid(s) (1 - sigmoid(s)) for the layers of each set k.

    Args:
        scores: s before, one per layer; sigmoids use these values, not those updated by earlier sets (the code).
        sets: suppressed layers.
        losses: mean loss with each set suppressed (nats).
    """
    rewards = [math.exp(-loss) for loss in losses]
    mean = math.fsum(rewards) / len(rewards)
    updated = list(scores)
    for chosen, reward in zip(sets, rewards, strict=True):
        for layer in chosen:
            slope = _sigmoid(scores[layer]) * _sigmoid(-scores[layer])
            updated[layer] += SCORE_RATE * (reward - mean) * slope
    return updated


def _sigmoid(value: float) -> float:
    return 0.5 * (1 + math.tanh(value / 2))
