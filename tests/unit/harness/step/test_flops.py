"""The bounds on speed are those of the project's note on performance, for Llama-2-7B."""

from __future__ import annotations

import pytest
from harness.step.flops import step_cost
from harness.step.spec import Settings, Shape

from baselines.method import Expectation, ModelFacts

LAYER, WORDS = 202_383_360, 131_072_000
FACTS = ModelFacts(
    architecture="LlamaForCausalLM",
    layer_parameters=(LAYER,) * 32,
    embedding_parameters=WORDS,
    head_parameters=WORDS,
    final_norm_parameters=4096,
    hidden_size=4096,
    tied_embeddings=False,
)
PLAIN = Settings(activation_checkpointing=False, chunked_loss=False)
CHECKPOINTED = Settings(activation_checkpointing=True, chunked_loss=False)
ADAPTERS = 32 * 128 * (3 * (4096 + 4096) + 2 * (4096 + 11008))


def promise(layers: str, trainable: int, **more: object) -> Expectation:
    fixed = {"state_bytes_per_parameter": 4, "state_of": "active", "trainable_parameters": trainable}
    return Expectation(layers=layers, **fixed, **more)  # type: ignore[arg-type]


FULL = promise("all", FACTS.total_parameters, embedding=True, head=True, final_norm=True)
LORA = promise("all", ADAPTERS, base_frozen=True)
LISA = promise("sampled", 2 * LAYER + 2 * WORDS + 4096, active_layers=2, embedding=True, head=True, final_norm=True)
GRASS = promise("sampled", 2 * LAYER, active_layers=2)


def milliseconds(method: Expectation, settings: Settings, batch: int) -> float:
    return 1e3 * step_cost(FACTS, method, settings, Shape(batch=batch, length=1024), attention_width=4096).seconds


@pytest.mark.parametrize(
    ("method", "settings", "batch", "noted"),
    [
        (FULL, PLAIN, 1, 135), (LORA, PLAIN, 1, 72.5), (LISA, PLAIN, 1, 74.9), (GRASS, PLAIN, 1, 62.2),
        (FULL, PLAIN, 4, 446), (LORA, PLAIN, 4, 290), (LISA, PLAIN, 4, 290), (GRASS, PLAIN, 4, 243),
        (FULL, CHECKPOINTED, 4, 584), (LORA, CHECKPOINTED, 4, 433), (LISA, CHECKPOINTED, 4, 428),
        (GRASS, CHECKPOINTED, 4, 338),
    ],
)  # fmt: skip
def test_times_are_those_of_the_note(method: Expectation, settings: Settings, batch: int, noted: float) -> None:
    assert milliseconds(method, settings, batch) == pytest.approx(noted, rel=0.025)


def test_training_the_embedding_forces_backward_through_all_layers() -> None:
    decoder = promise("sampled", 2 * LAYER, active_layers=2)
    embedding = promise("sampled", 2 * LAYER, active_layers=2, embedding=True)
    assert milliseconds(embedding, PLAIN, 1) > 1.1 * milliseconds(decoder, PLAIN, 1)


def test_a_chunked_loss_costs_a_trained_head_one_more_product() -> None:
    chunked = Settings(activation_checkpointing=False, chunked_loss=True)
    head = 1e3 * 2 * WORDS * 1024 / 400e12
    assert milliseconds(LISA, chunked, 1) - milliseconds(LISA, PLAIN, 1) == pytest.approx(head)
    assert milliseconds(GRASS, chunked, 1) == milliseconds(GRASS, PLAIN, 1)


def test_no_training_is_one_forward_pass() -> None:
    nothing = promise("none", 0)
    assert milliseconds(nothing, PLAIN, 1) == pytest.approx(milliseconds(FULL, PLAIN, 1) / 3, rel=0.35)
    assert milliseconds(nothing, CHECKPOINTED, 1) == milliseconds(nothing, PLAIN, 1)
