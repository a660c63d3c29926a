"""LoRA through peft: low-rank factors beside frozen weights, merged into them on export.

Three options are variants from other papers, as peft implements them: rsLoRA (Kalajdzievski 2023, arXiv 2312.03732),
PiSSA (Meng et al. 2024, arXiv 2404.02948) and LoRA+ (Hayou et al. 2024, arXiv 2402.12354).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from baselines.method import Expectation, Method, ModelFacts, Options, adamw, moment_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from baselines.method import Recipe


class LoraOptions(Options):
    """LoRA's block in the config."""

    rank: int = Field(gt=0, description="r")
    alpha: float = Field(gt=0, description="the update is scaled by alpha / rank, or as `rslora` says")
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] | None = Field(
        default=None, description="module names; null takes every linear but the head"
    )
    adapter_dtype: Literal["fp32", "weights"] = Field(
        default="fp32", description="dtype of the factors: fp32, as peft makes them, or the weights' own"
    )
    rslora: bool = Field(default=False, description="rsLoRA: scale by alpha / sqrt(rank) instead")
    init: Literal["zero", "pissa"] = Field(
        default="zero",
        description="zero: B = 0. pissa: A and B hold the largest singular directions of each weight, which keeps the "
        "rest; one singular value decomposition of each matrix, in fp32, before the first step, and fewer directions "
        "than `rank` where a matrix has fewer",
    )
    lr_ratio: float = Field(
        default=1.0, gt=0, description="LoRA+: rate of B over the rate of A, which is the run's; its paper advises 16"
    )


class Lora(Method):
    """Hu et al. 2021 (arXiv 2106.09685); y = W x + (alpha / r) B A x, B starting at 0.

    `init: pissa` changes the model's own weights in `attach`: W becomes W - (alpha / r) B A for the whole run. The
    resume state does not hold them, so a resumed run recomputes them from the model's folder. That gives the same bits
    on the same machine and library; on others, the decomposition may differ by about 1e-7 of a weight. With bf16
    weights, peft rounds these initial factors to bf16, whatever `adapter_dtype` says, so that the untrained model
    differs slightly from the loaded one.
    """

    Config = LoraOptions
    REQUIRES = ("peft",)
    PAPER = "arXiv 2106.09685"
    RANKS = True
    EXAMPLES: ClassVar[tuple[dict[str, Any], ...]] = (
        {"rank": 4, "alpha": 8},
        {"rank": 4, "alpha": 8, "dropout": 0.1},
        {"rank": 4, "alpha": 4, "rslora": True, "init": "pissa", "lr_ratio": 4.0},
    )
    PEFT_OPTIONS: ClassVar[Mapping[str, Any]] = {}
    """Arguments that a subclass adds to peft's `LoraConfig`."""
    options: LoraOptions

    def __init__(self, options: Options, *, recipe: Recipe, lr: float, seed: int) -> None:
        super().__init__(options, recipe=recipe, lr=lr, seed=seed)
        self.wrapped: Any = None

    def skip(self, facts: ModelFacts) -> str | None:
        """Skip a rank above the model's width, and missing targets: peft would train only the others."""
        if self.options.rank > facts.hidden_size:
            return f"rank {self.options.rank} is above the model's width {facts.hidden_size}"
        modules = {name.split(".")[-2] for name in facts.tensor_parameters if "." in name}
        missing = [target for target in self.options.targets or () if modules and target.split(".")[-1] not in modules]
        if not missing:
            return None
        tied = " (its head is tied to its embedding, and neither can have adapters)" * facts.tied_embeddings
        return f"targets: the model has no module named {', '.join(missing)}{tied}"

    def attach(self, model: nn.Module) -> nn.Module:
        """Inject adapters (peft's own initialisation, from the run's seed)."""
        import torch
        from peft import LoraConfig, get_peft_model

        from grass.layers import find_layers

        found = find_layers(model)
        # weights kept as buffers are in no gradient's reach: a tower beside the text
        unreached = [name for name, module in model.named_modules() if "weight" in module._buffers]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.wrapped = get_peft_model(
                model,
                LoraConfig(
                    r=self.options.rank,
                    lora_alpha=self.options.alpha,
                    lora_dropout=self.options.dropout,
                    target_modules=list(self.options.targets) if self.options.targets else "all-linear",
                    exclude_modules=unreached or None,
                    task_type="CAUSAL_LM",
                    use_rslora=self.options.rslora,
                    init_lora_weights="pissa" if self.options.init == "pissa" else True,
                    **self.PEFT_OPTIONS,
                ),
                autocast_adapter_dtype=self.options.adapter_dtype == "fp32",
            )
        self.model = self.wrapped
        adapters = {name: p for name, p in self.wrapped.named_parameters() if p.requires_grad}
        self.trainable_parameters = sum(p.numel() for p in adapters.values())
        self.layer_parameters = tuple(
            sum(p.numel() for p in layer.parameters() if p.requires_grad) for layer in found.layers
        )
        self.adapted_groups = self._groups_with_adapters(found.outside)
        if self.adapted_groups and self._is_tied(model):
            raise ValueError(
                "targets: the model's head is tied to its embedding, so adapters merged into one would change the "
                "other: name neither"
            )
        self.optimizer = adamw(self._groups(adapters), self.recipe, self.lr)
        wrapped: nn.Module = self.wrapped
        return wrapped

    def _groups(self, adapters: Mapping[str, Any]) -> list[Any]:
        """The optimizer's parameters or groups; LoRA+ as in `peft.optimizers.create_loraplus_optimizer`.

        There, vectors (DoRA's magnitudes) have the learning rate of B.
        """
        if self.options.lr_ratio == 1:
            return list(adapters.values())
        of_b = {name: "lora_B" in name or p.dim() == 1 for name, p in adapters.items()}
        return [
            {"params": [p for name, p in adapters.items() if not of_b[name]]},
            {"params": [p for name, p in adapters.items() if of_b[name]], "lr": self.lr * self.options.lr_ratio},
        ]

    def _groups_with_adapters(self, outside: Mapping[str, list[Any]]) -> set[str]:
        """Groups outside the decoder layers whose weights have adapters beside them."""
        keys = {id(p): key for key, parameters in outside.items() for p in parameters}
        adapted = [module.base_layer for module in self.wrapped.modules() if hasattr(module, "base_layer")]
        return {keys[id(p)] for module in adapted for p in module.parameters() if id(p) in keys}

    @staticmethod
    def _is_tied(model: Any) -> bool:
        """Whether embedding and head are one tensor."""
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        return len({id(getattr(end, "base_layer", end).weight) for end in ends if end is not None}) == 1

    def expect(self, facts: ModelFacts) -> Expectation:
        """Adapters move in every layer that has any, and in embedding and head if named; the model's weights do not."""
        return Expectation(
            layers="all",
            layer_trained_parameters=self.layer_parameters,
            embedding="embedding" in self.adapted_groups,
            head="head" in self.adapted_groups,
            base_frozen=True,
            trainable_parameters=self.trainable_parameters,
            state_bytes_per_parameter=moment_bytes(self.recipe),
            state_of="active",
        )

    def export(self, path: Path) -> None:
        """Merge the factors into the weights, so that plain transformers loads the folder."""
        self.wrapped.merge_and_unload().save_pretrained(path)
