"""Cells for the tests of forecasts: a Llama of 3 layers in true bf16, of the efficiency study, and a study as text."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

from harness.efficiency.spec import EfficiencyStudy, cell_of, load_efficiency
from harness.forecasting.forecast import Forecast, forecast
from harness.step.spec import Cell, Geometry, Numerics, Settings, Shape
from house import ROOT

LAYERS, VOCABULARY, WIDTH, PARAMETERS = 3, 96, 32, 38624
SHAPE = Shape(batch=2, length=24)
SMALL = Geometry(
    architecture="llama",
    hidden_size=WIDTH,
    intermediate_size=80,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=VOCABULARY,
    tie_word_embeddings=False,
    parameters=PARAMETERS,
)
# as a file: the small model as plain text, three methods, one setting
STUDY = """\
study: mine
title: A study
models:
  small:
    architecture: llama
    hidden_size: 32
    intermediate_size: 80
    num_hidden_layers: 4
    num_attention_heads: 4
    num_key_value_heads: 2
    head_dim: 8
    vocab_size: 96
    tie_word_embeddings: false
    parameters: 49440
methods:
  full: {module: full}
  lora: {module: lora, options: {rank: 64, alpha: 16}}
  uniform: {module: grass, options: {active_layers: 1, sampler: uniform, offload: auto}}
settings:
  lean: {activation_checkpointing: true, chunked_loss: true}
shapes:
  short: {batch: 1, length: 16}
numerics: {weight_dtype: bf16, state_dtype: bf16, max_grad_norm: 1.0}
anchor: {cuda: small, cpu: small}
compared: [full, lora]
corners: [{settings: lean, shape: short}]
order: [{kind: everything}]
reference: full
"""
SETTINGS = {
    "plain": Settings(activation_checkpointing=False, chunked_loss=False),
    "lean": Settings(activation_checkpointing=True, chunked_loss=True),
}
DECODER = {"train_embedding": False, "train_head": False, "train_final_norm": False}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "lora": ("lora", {"rank": 8, "alpha": 16, "adapter_dtype": "weights"}),
    "lora-fp32": ("lora", {"rank": 8, "alpha": 16}),
    "lisa": ("lisa", {"active_layers": 2}),
    "lisa-keep": ("lisa", {"active_layers": 2, "state": "keep"}),
    "grass-move": ("grass", {"active_layers": 2, "probe_steps": 2, "offload": "move"}),
    "grass-resident": ("grass", {"active_layers": 2, "probe_steps": 2, "offload": "resident"}),
    "decoder-move": ("grass", {"active_layers": 2, "probe_steps": 2, "offload": "move", **DECODER}),
    "decoder-resident": ("grass", {"active_layers": 2, "probe_steps": 2, "offload": "resident", **DECODER}),
}
# pieces and chunks so small that every matrix has several, as matrices of true size have
PIECE, CHUNK = 2048, 4 * 2048 * 2
CHUNK_ROWS = 8


def small(method: str, settings: str) -> Cell:
    """A cell of the small model; two of its layers train at a time."""
    module, options = METHODS[method]
    numerics = Numerics(weight_dtype="bf16", state_dtype="bf16", max_grad_norm=1.0)
    return Cell(
        model=SMALL, module=module, options=options, settings=SETTINGS[settings], shape=SHAPE, numerics=numerics
    )


@cache
def small_forecast(method: str, settings: str, tensors: Literal["fake", "real"] = "fake") -> Forecast:
    """Forecast of a small cell, or the same run on real tensors; once a session."""
    return forecast(small(method, settings), tensors=tensors)


@cache
def study() -> EfficiencyStudy:
    """The published efficiency study."""
    return load_efficiency(ROOT / "config" / "efficiency.yaml")


@cache
def true_size(model: str, method: str, settings: str, batch: int) -> Forecast:
    """Forecast of a cell of the study, 1024 tokens a row; once a session."""
    return forecast(
        cell_of(study(), model=model, method=method, settings=settings, shape=Shape(batch=batch, length=1024))
    )
