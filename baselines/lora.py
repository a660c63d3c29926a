"""LoRA through peft: low-rank factors beside frozen weights, merged into them on export."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from baselines.method import Expectation, Method, ModelFacts, Options, adamw, moment_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from baselines.method import Recipe


class LoraOptions(Options):
    """LoRA's block in the config."""

    rank: int = Field(gt=0, description="r")
    alpha: float = Field(gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] | None = Field(
        default=None, description="module names; null takes every linear but the head"
    )
    adapter_dtype: Literal["fp32", "weights"] = Field(
        default="fp32", description="dtype of the factors: fp32, as peft makes them, or the weights' own"
    )


class Lora(Method):
    """Hu et al. 2021 (arXiv 2106.09685); y = W x + (alpha / r) B A x, B starting at 0."""

    Config = LoraOptions
    REQUIRES = ("peft",)
    PAPER = "arXiv 2106.09685"
    EXAMPLES = ({"rank": 4, "alpha": 8}, {"rank": 4, "alpha": 8, "dropout": 0.1})
    options: LoraOptions

    def __init__(self, options: Options, *, recipe: Recipe, lr: float, seed: int) -> None:
        super().__init__(options, recipe=recipe, lr=lr, seed=seed)
        self.wrapped: Any = None

    def skip(self, facts: ModelFacts) -> str | None:
        """A rank above the width is no low rank."""
        if self.options.rank > facts.hidden_size:
            return f"rank {self.options.rank} is above the model's width {facts.hidden_size}"
        return None

    def attach(self, model: nn.Module) -> nn.Module:
        """Inject adapters (peft's own initialisation, from the run's seed)."""
        import torch
        from peft import LoraConfig, get_peft_model

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.wrapped = get_peft_model(
                model,
                LoraConfig(
                    r=self.options.rank,
                    lora_alpha=self.options.alpha,
                    lora_dropout=self.options.dropout,
                    target_modules=list(self.options.targets) if self.options.targets else "all-linear",
                    task_type="CAUSAL_LM",
                ),
                autocast_adapter_dtype=self.options.adapter_dtype == "fp32",
            )
        self.model = self.wrapped
        adapters = [p for p in self.wrapped.parameters() if p.requires_grad]
        self.trainable_parameters = sum(p.numel() for p in adapters)
        self.optimizer = adamw(adapters, self.recipe, self.lr)
        wrapped: nn.Module = self.wrapped
        return wrapped

    def expect(self, facts: ModelFacts) -> Expectation:
        """Adapters in every layer move, the model's own weights do not."""
        return Expectation(
            layers="all",
            base_frozen=True,
            trainable_parameters=self.trainable_parameters,
            state_bytes_per_parameter=moment_bytes(self.recipe),
            state_of="active",
        )

    def export(self, path: Path) -> None:
        """Merge the factors into the weights, so that plain transformers loads the folder."""
        self.wrapped.merge_and_unload().save_pretrained(path)
