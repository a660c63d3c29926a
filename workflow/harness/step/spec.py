"""The specification of one training step: model, method, settings, shape and number formats. Imports no torch.

Memory and speed of a step depend on shapes alone, so a model is given by its configuration, and has random weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from baselines import find_method
from baselines.method import Method, Recipe, Strict, later
from harness.errors import UserError


class Geometry(Strict):
    """The part of a Hugging Face model's configuration that decides its memory and its arithmetic."""

    architecture: Literal["llama", "mistral", "gemma", "qwen2", "qwen3"] = Field(description="transformers' model type")
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    tie_word_embeddings: bool
    parameters: int = Field(gt=0, description="what the published model has; the built one must have as many")

    @model_validator(mode="after")
    def _heads_fit(self) -> Geometry:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: must divide the attention heads, {self.num_attention_heads}, "
                f"and {self.num_key_value_heads} does not"
            )
        return self

    def fields(self) -> dict[str, Any]:
        """Arguments for the transformers configuration class."""
        return self.model_dump(exclude={"architecture", "parameters"})


class Settings(Strict):
    """What is switched on for every method alike."""

    activation_checkpointing: bool = Field(description="non-reentrant, without the hook on the embedding's output")
    chunked_loss: bool = Field(description="the head is applied to some tokens at a time")


class Shape(Strict):
    """One micro-batch: one step."""

    batch: int = Field(gt=0, description="rows")
    length: int = Field(gt=1, description="tokens a row, none of them padding")


class Numerics(Strict):
    """What of a recipe decides memory."""

    weight_dtype: Literal["fp32", "bf16"]
    state_dtype: Literal["fp32", "bf16", "int8"] = Field(description="dtype of the optimizer's moments")
    stochastic_rounding: bool = later(False, description="of bf16 weights and bf16 second moments")
    max_grad_norm: float | None = Field(gt=0, description="global-norm clipping; null switches it off")


class Cell(Strict):
    """Model x method x settings x shape: what is forecast, or run."""

    model: Geometry | Path = Field(description="a geometry, or a folder with a config.json")
    module: str
    options: dict[str, Any]
    settings: Settings
    shape: Shape
    numerics: Numerics
    micro_batches: int = Field(default=1, gt=0, description="a step; two stand for any larger number")
    autocast: bool = later(False, description="bf16 matrix products over fp32 weights, as a run's recipe may ask for")
    capacity_bytes: int | None = later(
        None, description="memory of the card, by which `offload: auto` decides in a forecast; null: it always offloads"
    )
    lr: float = 1e-5
    seed: int = 0

    def recipe(self, *, steps: int, device: Literal["cpu", "cuda"]) -> Recipe:
        """The contract's recipe for `steps` steps of this cell."""
        return Recipe(
            steps=steps,
            batch_size=self.shape.batch * self.micro_batches,
            micro_batch_size=self.shape.batch,
            max_length=self.shape.length,
            loss_on="all",
            warmup_steps=0,
            schedule="constant",
            max_grad_norm=self.numerics.max_grad_norm,
            weight_dtype=self.numerics.weight_dtype,
            compute_dtype="bf16" if self.autocast else None,
            state_dtype=self.numerics.state_dtype,
            stochastic_rounding=self.numerics.stochastic_rounding,
            activation_checkpointing=self.settings.activation_checkpointing,
            device=device,
        )

    def method_class(self) -> type[Method]:
        """The cell's method; importing it imports no torch."""
        return find_method(self.module)

    def with_options(self, **changes: Any) -> Cell:
        """The same cell with other options of the method.

        Raises:
            UserError: the method has no such option, or refuses the value.
        """
        known = self.method_class().Config.model_fields
        for name, value in changes.items():
            if name not in known:
                raise UserError(f"the method {self.module} has no option {name} (it has {', '.join(known) or 'none'})")
            try:
                self.method_class().Config.model_validate({**self.options, name: value}, strict=False)
            except ValidationError as error:
                raise UserError(f"--{name.replace('_', '-')} {value}: {error.errors()[0]['msg']}") from None
        return self.model_copy(update={"options": {**self.options, **changes}})


def shape_of(batch: int, length: int) -> Shape:
    """The shape given on a command line.

    Raises:
        UserError: one of the two is out of range.
    """
    for name, value, least in (("batch", batch, 1), ("length", length, 2)):
        if value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    return Shape(batch=batch, length=length)
