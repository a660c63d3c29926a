"""BREAD: block coordinate descent with landscape expansion (NeurIPS 2025, OpenReview DBybUx7ARy).

One decoder layer at a time, the active block, trains with Adam for `period` steps from zero moments, as in BAdam. All
other layers are updated cheaply from the same backward pass, whose gradients would otherwise be discarded. The paper
leaves the cheap update open (low rank, SGD or others); we follow the authors' code (repository
microsoft/BlockOptimizers, block_optim.py):

`others: sgd` or `sign`: a hook steps each inactive tensor by its gradient, or the gradient's sign, times the learning
rate times `others_lr_ratio`, into the weight's own dtype and without weight decay, and frees the gradient at once. So
weights change within a backward pass. With gradient accumulation, micro-batches would see different weights, so such
recipes are skipped. In bf16 a step below half a unit in the last place is lost. `others: low_rank`: LoRA factors beside
every linear layer, the active block's too, train all the time by the same Adam at the same rate; their moments are
cleared at each switch as well.

bf16 weights of the active block have an fp32 copy while they train; no cache is emptied (ours). With SGD, clipping
covers only the active block (ours), since the global norm is known only after the hooks' updates. Also ours: embedding,
final norm and head are frozen, while the code's SGD steps them too (`step_outside`); the code's mode "partial", SGD
above the active block only, is left out; LoRA's dropout is 0 (the readme has 0.1); shuffles use their own seed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from baselines.matrices import copied_bytes, give_gradients, round_into_weights, trained_copy
from baselines.method import Expectation, LayerTrace, Method, ModelFacts, Options, StepFacts, adamw, moment_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn


class BreadOptions(Options):
    """BREAD's block in the config."""

    others: Literal["sgd", "sign", "low_rank"] = Field(default="sgd", description="update of the inactive layers")
    period: int = Field(default=100, gt=0, description="K, steps of a block; 100 in the readme, 50 in the signature")
    order: Literal["random", "ascending", "descending"] = Field(
        default="random", description="random: shuffled anew for each sweep, as in the readme"
    )
    others_lr_ratio: float = Field(
        default=5.0, gt=0, description="SGD's rate over Adam's; 5 in the readme, 1 in the signature"
    )
    step_outside: bool = Field(default=False, description="SGD on embedding, final norm and head too, as in the code")
    rank: int = Field(default=8, gt=0, description="low_rank: r, 8 in the readme")
    alpha: float = Field(default=32.0, gt=0, description="low_rank: factors are scaled by alpha / r, 32 in the readme")


class Bread(Method):
    """Trains one layer with Adam, all others with an update that needs little or no state."""

    Config = BreadOptions
    PAPER = "OpenReview DBybUx7ARy"
    EXAMPLES = (
        {"period": 3},
        {"period": 4, "others": "sign", "others_lr_ratio": 0.1, "step_outside": True, "order": "descending"},
        {"period": 3, "others": "low_rank", "rank": 4, "alpha": 8},
    )
    options: BreadOptions
    active = -1
    """The layer trained with Adam."""
    _in_backward = False

    def __init__(self, options: Options, *, recipe: Any, lr: float, seed: int) -> None:
        super().__init__(options, recipe=recipe, lr=lr, seed=seed)
        self.left: list[int] = []
        """Layers still to come in this sweep."""
        self.held: list[Tensor] = []
        """Tensors that Adam updates, one per tensor of the active layer: the weight, or its fp32 copy."""
        self.taken: list[Tensor | None] = []
        """Gradients of the active layer, between backward and update."""
        self.adapters: list[Tensor] = []
        self.wrapped: Any = None

    def skip(self, facts: ModelFacts) -> str | None:
        """Skip accumulation with SGD, which updates in every backward pass, and layers of different sizes."""
        options = self.options
        if options.others != "low_rank" and self.recipe.accumulation_steps > 1:
            return "gradient accumulation: inactive layers are updated in every backward pass; use others: low_rank"
        if options.others == "low_rank" and importlib.util.find_spec("peft") is None:
            return "others: low_rank needs the package peft"
        if options.others == "low_rank" and options.rank > facts.hidden_size:
            return f"rank {options.rank} is above the model's width {facts.hidden_size}"
        smallest, largest = min(facts.layer_parameters), max(facts.layer_parameters)
        if largest > 1.01 * smallest:
            return (
                f"layers of different sizes, {smallest:,} to {largest:,} parameters: state is promised to be constant"
            )
        return None

    def attach(self, model: nn.Module) -> nn.Module:
        """Register hooks on all parameters that SGD may step, or add LoRA factors to every linear layer."""
        import torch

        from grass.layers import find_layers

        self.model = module = model.requires_grad_(False)
        found = find_layers(model)
        self.blocks = found.layer_parameters()
        self.outside = [p for parameters in found.outside.values() for p in parameters]
        self.generator = torch.Generator().manual_seed(self.seed)
        if self.options.others == "low_rank":
            self.model = self.wrapped = module = self._with_factors(model)
        else:
            blocks = [*enumerate(self.blocks), *([(-1, self.outside)] if self.options.step_outside else [])]
            for block, parameters in blocks:
                for parameter in parameters:
                    parameter.requires_grad_(True).register_post_accumulate_grad_hook(self._sgd(block))
        self.optimizer = adamw([*self.blocks[0], *self.adapters], self.recipe, self.lr)
        return module

    def begin_step(self, step: int) -> None:
        """Activate the next block every `period` steps; a random sweep draws uniformly among those left."""
        from grass.sampling import draw_layers

        if step % self.options.period == 0:
            if not self.left:
                self.left = list(range(len(self.blocks)))
            place = 0 if self.options.order == "ascending" else len(self.left) - 1
            if self.options.order == "random":
                (place,) = draw_layers([1.0] * len(self.left), 1, self.generator)
            self._activate(self.left.pop(place))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Hooks consume the inactive layers' gradients; those of the active layer are kept for the update."""
        self._in_backward = True
        loss.backward()
        self._in_backward = False
        if self.options.others != "low_rank":
            self.taken = [p.grad for p in self.blocks[self.active]]
            for parameter in self.blocks[self.active]:
                parameter.grad = None

    def end_step(self, replay: Callable[[], Iterator[Tensor]]) -> StepFacts:
        """Clip and update what Adam trains; bf16 weights are rounded from their fp32 copies."""
        pairs = list(zip(self.blocks[self.active], self.held, strict=True))
        for weight, _ in pairs:
            if self.taken:
                weight.grad = self.taken.pop(0)
        give_gradients(pairs)
        facts = super().end_step(replay)
        round_into_weights(pairs)
        return facts

    def trace(self) -> LayerTrace:
        """The active block."""
        return LayerTrace(active=(self.active,))

    def expect(self, facts: ModelFacts) -> Expectation:
        """All layers move in every period; state exists for one layer and the factors."""
        options, layer, moments = self.options, max(facts.layer_parameters), moment_bytes(self.recipe)
        factors = sum(p.numel() for p in self.adapters)
        low_rank, outside = options.others == "low_rank", options.step_outside and options.others != "low_rank"
        all_layers = facts.total_parameters if outside else sum(facts.layer_parameters)
        return Expectation(
            layers="all",
            period_steps=options.period,
            embedding=outside,
            head=outside,
            final_norm=outside,
            gradients="kept" if low_rank else "consumed",
            trainable_parameters=layer + factors if low_rank else all_layers,
            state_of="constant",
            state_bytes=layer * (moments + copied_bytes(self.recipe)) + factors * moments,
        )

    def state_dict(self) -> dict[str, Any]:
        """Moments, fp32 copies, the sweep and the generator."""
        copied = {i: h for i, h in enumerate(self.held) if h is not self.blocks[self.active][i]}
        own = {"active": self.active, "left": self.left, "copies": copied, "generator": self.generator.get_state()}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._activate(state["active"])
        for i, copy in state["copies"].items():
            self.held[i].copy_(copy)
        super().load_state_dict(state)
        self.left = list(state["left"])
        self.generator.set_state(state["generator"])

    def export(self, path: Path) -> None:
        """Write the model, with the factors merged into its weights."""
        if self.wrapped is None:
            super().export(path)
        else:
            self.wrapped.merge_and_unload().save_pretrained(path)

    def _sgd(self, block: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            # ignore backward passes outside training, such as an observer's
            if not self._in_backward or block == self.active:
                return
            assert self.optimizer is not None
            assert parameter.grad is not None
            step = parameter.grad.sign() if self.options.others == "sign" else parameter.grad
            parameter.add_(step, alpha=-self.optimizer.param_groups[0]["lr"] * self.options.others_lr_ratio)
            parameter.grad = None

        return hook

    def _activate(self, block: int) -> None:
        """Drop the moments of the previous block and of the factors; the new block starts from zero moments."""
        from grass.backward import stop_at_lowest_layer
        from grass.layers import set_trainable

        assert self.optimizer is not None
        assert self.model is not None
        self.active = block
        self.held = [trained_copy(p, self.recipe) for p in self.blocks[block]]
        self.optimizer.state.clear()
        self.optimizer.param_groups[0]["params"] = [*self.held, *self.adapters]
        if self.options.others == "low_rank":
            for number, parameters in enumerate(self.blocks):
                set_trainable(parameters, number == block)
        if not self.options.step_outside:
            stop_at_lowest_layer(self.model)

    def _with_factors(self, model: nn.Module) -> Any:
        import torch
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=self.options.rank, lora_alpha=self.options.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            wrapped = get_peft_model(model, config)
        self.adapters = [p for p in wrapped.parameters() if p.requires_grad]
        return wrapped
