"""Arithmetic and optimizer traffic of one training step, and the speed that follows if every method runs alike.

The count is the usual one: a matrix product with N weights takes 2 N FLOP a token forward, as many for the gradient of
its input and as many for the gradient of its weights. A frozen layer computes no weight gradient; a layer below the
lowest one that trains computes neither gradient, and is not recomputed. Attention is causal, so half of its scores are
counted. Copies between device and host, small kernels and the optimizer's kernel launches are left out. The speeds are
therefore bounds that assume equal efficiency; none is measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from baselines.method import Expectation, ModelFacts
from harness.step.spec import Settings, Shape

FLOP_PER_S = 400e12
"""Rate of dense bf16 matrix products assumed for an H100: 40 % of its 989 TFLOP/s."""
OPTIMIZER_BYTES = 14
"""AdamW's traffic per trained parameter, in bf16: weight, gradient, two moments read; all but the gradient written."""
BYTES_PER_S = 3.0e12
"""Rate of memory-bound kernels assumed for an H100: 90 % of its 3.35 TB/s."""


@dataclass(frozen=True)
class StepCost:
    """One optimizer step of one micro-batch."""

    flop: float
    optimizer_bytes: float
    tokens: int

    @property
    def seconds(self) -> float:
        """At the nominal rates of this module."""
        return self.flop / FLOP_PER_S + self.optimizer_bytes / BYTES_PER_S

    @property
    def tokens_per_s(self) -> float:
        """At the nominal rates of this module."""
        return self.tokens / self.seconds


def step_cost(
    facts: ModelFacts, promise: Expectation, settings: Settings, shape: Shape, *, attention_width: int
) -> StepCost:
    """Cost of a mean step: `sampled` layers are drawn uniformly.

    Args:
        facts: of the model.
        promise: what the method trains.
        settings: checkpointing recomputes the layers that backward visits; a chunked loss multiplies a trained head
            once more.
        shape: of the micro-batch.
        attention_width: query heads times their width.
    """
    tokens = shape.batch * shape.length
    layers, depth = 2.0 * sum(facts.layer_parameters), facts.layers
    layers += 2.0 * shape.length * attention_width * depth
    head = 2.0 * (facts.embedding_parameters if facts.tied_embeddings else facts.head_parameters)
    trains_head = (promise.embedding if facts.tied_embeddings else promise.head) and not promise.base_frozen
    visited = _reach(facts, promise)
    flop = layers + head
    if promise.layers != "none":
        flop += layers * visited + head
        flop += layers * visited * settings.activation_checkpointing
        flop += 2.0 * _trained_in_layers(facts, promise)
        flop += head * trains_head * (1 + settings.chunked_loss)
    if promise.base_frozen:
        # adapters add matrix products: forward, recomputed forward, and the gradient of their input
        flop += 2.0 * promise.trainable_parameters * (2 + settings.activation_checkpointing)
    return StepCost(flop * tokens, OPTIMIZER_BYTES * promise.trainable_parameters, tokens)


def attention_width(config: Any) -> int:
    """Query heads times their width, from a transformers configuration."""
    text = config.get_text_config()
    return int(
        text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    )


def _reach(facts: ModelFacts, promise: Expectation) -> float:
    """Mean share of the layers that backward visits: all of them, or those from the lowest drawn one upwards."""
    if promise.layers != "sampled" or promise.embedding:
        return 1.0
    drawn = promise.active_layers or 1
    return 1 - (facts.layers - drawn) / (drawn + 1) / facts.layers


def _trained_in_layers(facts: ModelFacts, promise: Expectation) -> float:
    if promise.base_frozen:
        return promise.trainable_parameters
    if promise.layers == "sampled":
        return sum(facts.layer_parameters) * (promise.active_layers or 1) / facts.layers
    return sum(facts.layer_parameters)
