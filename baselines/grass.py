"""GRASS as a `Method`: a thin adapter over `grass.Grass` that uses the same contract as every other method.

`sampler: static` is the paper's GRASS* (probabilities from the probe throughout); `sampler: uniform` is a control that
the paper lacks: LISA's draws with persistent state.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from baselines.method import (
    Calibration,
    Expectation,
    LayerTrace,
    Method,
    ModelFacts,
    Options,
    StepFacts,
    later,
    moment_bytes,
    tied_conflict,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from baselines.method import Batch
    from grass import Grass


class GrassOptions(Options):
    """GRASS's block in the config; every default is ours, since the paper gives no value."""

    active_layers: int = Field(default=4, gt=0, description="gamma")
    sample_every: int | None = Field(default=None, gt=0, description="T_s; null: 50, or 25 under 1,000 steps")
    refresh_every: int | None = Field(default=None, gt=0, description="T_u, a multiple of T_s; null: T_s")
    probe_steps: int = Field(default=50, gt=0, description="T_p, batches of the probe, beside the training steps")
    temperature: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        default="auto", description="tau: a number (the paper's plain softmax), or auto: so that `target` is met (ours)"
    )
    target: float = later(0.7, gt=0, lt=1, description="temperature auto: effective layers wanted, a share of all")
    norm: Literal["none", "mean", "sum", "max", "zscore"] = "mean"
    ema: float = Field(default=0.5, ge=0, le=1, description="alpha, weight of the new measurement")
    sampler: Literal["importance", "uniform", "inverse", "topk", "fixed", "static", "age", "cyclic"] = "importance"
    reprobe: bool = Field(default=False, description="measure all layers anew at each refresh, on the probe's batches")
    state: Literal["keep", "reset"] = "keep"
    offload: Literal["auto", "resident", "move"] = Field(default="auto", description="where moments live")
    train_embedding: bool = True
    train_head: bool = True
    train_final_norm: bool = True

    @model_validator(mode="after")
    def _periods_fit(self) -> GrassOptions:
        if self.sample_every and self.refresh_every and self.refresh_every % self.sample_every:
            raise ValueError(f"refresh_every {self.refresh_every} is no multiple of sample_every {self.sample_every}")
        return self


class GrassMethod(Method):
    """GRASS (arXiv 2604.07808)."""

    Config = GrassOptions
    PAPER = "arXiv 2604.07808"
    RANKS = True
    ADAMW = True
    # a random model's layers differ by noise, which `auto` turns into draws, other ones with other micro-batches
    EXAMPLES = (
        {"active_layers": 2, "sample_every": 3, "probe_steps": 2, "temperature": 1.0},
        {
            "active_layers": 1,
            "sample_every": 3,
            "refresh_every": 6,
            "probe_steps": 2,
            "state": "reset",
            "temperature": 1.0,
        },
        {"active_layers": 2, "sample_every": 3, "probe_steps": 2, "sampler": "static", "temperature": 1.0},
        {"active_layers": 2, "sample_every": 3, "sampler": "uniform", "train_embedding": False, "train_head": False},
        {"active_layers": 1, "sample_every": 2, "probe_steps": 2, "reprobe": True, "offload": "move", "target": 0.5},
        {"active_layers": 1, "sample_every": 3, "sampler": "cyclic", "state": "reset", "offload": "move"},
    )
    options: GrassOptions
    optimizer: Grass

    @property
    def sample_every(self) -> int:
        """T_s, resolved: if the config does not set it, 25 under 1,000 steps, else 50."""
        return self.options.sample_every or (25 if self.recipe.steps < 1000 else 50)

    def skip(self, facts: ModelFacts) -> str | None:
        """Reject what `Grass` would reject, before any work."""
        if self.options.active_layers > facts.layers:
            return f"active_layers {self.options.active_layers} is above the model's {facts.layers} layers"
        if self.options.refresh_every is not None and self.options.refresh_every % self.sample_every:
            return f"refresh_every {self.options.refresh_every} is no multiple of sample_every {self.sample_every}"
        return tied_conflict(facts, embedding=self.options.train_embedding, head=self.options.train_head)

    def attach(self, model: nn.Module) -> nn.Module:
        """Build the optimizer over the whole model; it freezes the sleeping layers."""
        from grass import Grass
        from grass.distributed import ranks

        self.model = model
        self.optimizer = Grass(
            model,
            lr=self.lr,
            active_layers=self.options.active_layers,
            sample_every=self.sample_every,
            refresh_every=self.options.refresh_every,
            temperature=self.options.temperature,
            target=self.options.target,
            norm=self.options.norm,
            ema=self.options.ema,
            sampler=self.options.sampler,
            state=self.options.state,
            reprobe=self._calibration_batches if self.options.reprobe else False,
            offload=self.options.offload,
            accumulation_steps=self.recipe.accumulation_steps // ranks(),
            train_embedding=self.options.train_embedding,
            train_head=self.options.train_head,
            train_final_norm=self.options.train_final_norm,
            state_dtype=self.recipe.state_dtype,
            stochastic_rounding=self.recipe.stochastic_rounding,
            betas=self.recipe.betas,
            eps=self.recipe.eps,
            weight_decay=self.recipe.weight_decay,
            max_grad_norm=self.recipe.max_grad_norm,
            seed=self.seed,
        )
        return model

    def prepare(self, calibration: Calibration) -> None:
        """Run the probing phase on separate batches: it consumes no schedule steps and no training rows."""
        if self.optimizer.needs_probe:
            self.optimizer.probe(calibration.batches(self.options.probe_steps), calibration.loss)

    def _calibration_batches(self) -> Iterator[Batch]:
        assert self.calibration is not None
        return self.calibration.batches(self.options.probe_steps)

    def begin_step(self, step: int) -> None:
        """Read the past period's norms, which wait on the device: a resumed run has the same tensors alive."""
        if step % self.sample_every == 0:
            self.optimizer.history[-1:]  # one read is a read of all

    def end_step(self, replay: Callable[[], Iterator[Tensor]]) -> StepFacts:
        """`Grass.step` measures, clips and updates."""
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        norm, limit = self.optimizer.last_grad_norm, self.recipe.max_grad_norm
        assert norm is not None
        return StepFacts(grad_norm=norm, clipped=limit is not None and norm > limit)

    def trace(self) -> LayerTrace:
        """The optimizer's active layers, importance, probabilities and ages."""
        opt = self.optimizer
        return LayerTrace(
            active=opt.active,
            importance=None if opt.importance is None else tuple(opt.importance.values),
            probability=tuple(opt.probability),
            temperature=opt.temperature if opt.temperature != math.inf else None,
            age_steps=opt.age_steps,
        )

    def pinned_bytes(self) -> int:
        """Host blocks of moments that are registered with CUDA."""
        offload = self.optimizer.states.offload
        return 0 if offload is None else offload.arena.pinned_bytes

    def sleeps_on_host(self) -> bool:
        """With `auto` moments may stay on the device, which is known only once its peak is."""
        return self.options.offload == "move"

    def expect(self, facts: ModelFacts) -> Expectation:
        """Drawn layers move in their period; with `keep`, every layer visited so far has state."""
        options = self.options
        largest = sum(sorted(facts.layer_parameters)[-options.active_layers :])
        outside = facts.outside_parameters(
            embedding=options.train_embedding, head=options.train_head, final_norm=options.train_final_norm
        )
        return Expectation(
            layers="sampled",
            active_layers=options.active_layers,
            period_steps=self.sample_every,
            embedding=options.train_embedding,
            head=options.train_head,
            final_norm=options.train_final_norm,
            trainable_parameters=largest + outside,
            state_bytes_per_parameter=moment_bytes(self.recipe),
            state_in_8_bits=self.recipe.state_dtype == "int8",
            state_of="visited" if options.state == "keep" else "active",
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the optimizer with its active set, and the probe's loss: a resumed run calls no `prepare`."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.calibration is not None:
            self.optimizer.probe_loss = self.calibration.loss
