"""Every option of `Grass`: its meaning, whether it is the paper's or ours, and which values are rejected."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from grass.importance import Norm
from grass.quantised import PACKED
from grass.sampling import Sampler

State = Literal["keep", "reset"]
Offload = Literal["resident", "move", "auto"]
Reprobe = Literal[False] | Iterable[Any] | Callable[[], Iterable[Any]]

StateDtype = Literal["fp32", "bf16", "int8"]

STATE_DTYPES: dict[StateDtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": PACKED}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `Grass`; names in brackets are the paper's symbols.

    "Paper" marks what the paper describes. The paper publishes no value of gamma, T_p, T_s, T_u, tau, alpha, learning
    rate or clipping, so every default is ours.
    """

    lr: float
    """Peak learning rate of every group; torch schedulers act on it as usual."""
    active_layers: int = 4
    """[gamma] Decoder layers that train in a period (paper)."""
    sample_every: int = 50
    """[T_s] Steps between two draws of the active layers (paper; it finds 25 to 50 best, 5 bad)."""
    refresh_every: int | None = None
    """[T_u] Steps between two refreshes of the probabilities, a multiple of `sample_every` (paper); None: T_s."""
    probe_steps: int = 0
    """[T_p] Probing steps taken *inside* `step()`: the first T_p calls measure all layers and update nothing. They
    consume training data and steps of the learning-rate schedule, warm-up included. 0 (ours): call `probe(batches)`
    before training instead, outside data and schedule."""
    temperature: float | Literal["auto"] = "auto"
    """[tau] Temperature of the softmax over the scaled mean gradient norms: a number (paper), or `auto` (ours): after
    probing, and again at every refresh, the one that gives the effective number of layers asked for by `target`."""
    target: float = 0.7
    """`temperature="auto"`: wanted effective number of layers exp(H(p)) as a share of all layers, above 0 and below 1;
    at least `active_layers` + 1 layers, since fewer would draw nearly the same set for ever (ours)."""
    norm: Norm = "mean"
    """Scaling of the mean gradient norms before the softmax (ours; the paper names none, but raw values of 1e-6 to
    1e-3 would make the softmax uniform)."""
    ema: float = 0.5
    """[alpha] Weight of the *new* measurement in a refresh (paper)."""
    train_embedding: bool = True
    """Train the input embedding, with position embeddings and any other parameter outside the stack (ours)."""
    train_head: bool = True
    """Train the language-model head; a head tied to the embedding follows `train_embedding` (ours)."""
    train_final_norm: bool = True
    """Train the normalisation after the last decoder layer (ours)."""
    state: State = "keep"
    """`keep` the moments of sleeping layers (paper), or `reset` them when a layer stops training (a control)."""
    sampler: Sampler = "importance"
    """How layers are drawn: `importance` (paper), `static` (paper's GRASS*), or a control (see `grass.sampling`)."""
    reprobe: Reprobe = False
    """A control: batches, or a function that returns them, with which *all* layers are measured again at each refresh.
    False (paper): a refresh uses measurements from the active layers' own steps."""
    offload: Offload = "auto"
    """Where moments are kept. `resident`: those of active layers on the device, of sleeping layers on the host (paper:
    moved when layers change). `move`: all on the host, staged in chunks only for the update. `auto`: chosen by free
    memory at peak. Results are bitwise equal."""
    state_dtype: StateDtype = "fp32"
    """Dtype of the moments (ours; the paper's memory table needs bf16, whose second moment never decays). `int8`: codes
    of 8 bits, with a scale for every 256 of them (see `grass.quantised`)."""
    stochastic_rounding: bool = False
    """Round bf16 weights and bf16 second moments up or down at random, with the exact value as expectation; the update
    is then computed in fp32 (ours)."""
    accumulation_steps: int = 1
    """Backward passes per step. It identifies the last one, during which states can be fetched; for loops in which the
    number varies, see `Grass.last_micro_batch`."""
    seed: int = 0
    """Seed of the generator for draws, and of stochastic rounding."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay; sleeping layers have no gradient and do not decay."""
    max_grad_norm: float | None = None
    """Clip the global norm of the active gradients inside `step()`, after importance was measured. The norm covers
    active parameters only, so a bound of 1 is weaker than in full fine-tuning."""

    def __post_init__(self) -> None:
        """Reject options that are invalid for every model.

        Raises:
            ValueError: an option out of range; the message names it.
        """
        for name, valid in (
            ("norm", get_args(Norm)),
            ("sampler", get_args(Sampler)),
            ("state", get_args(State)),
            ("offload", get_args(Offload)),
            ("state_dtype", tuple(STATE_DTYPES)),
        ):
            given = getattr(self, name)
            if given not in valid:
                raise ValueError(f"{name} must be one of {', '.join(valid)}, not {given!r}")
        for name, least in (("active_layers", 1), ("sample_every", 1), ("probe_steps", 0), ("accumulation_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.refresh < 1 or self.refresh % self.sample_every:
            raise ValueError(
                f"refresh_every must be a multiple of sample_every ({self.sample_every}), not {self.refresh}"
            )
        if self.temperature != "auto" and (isinstance(self.temperature, str) or not self.temperature > 0):
            raise ValueError(f"temperature must be above 0 or 'auto', not {self.temperature!r}")
        if not 0 < self.target < 1:
            raise ValueError(f"target must be above 0 and below 1 (a share of all layers), not {self.target}")
        if not 0 <= self.ema <= 1:
            raise ValueError(f"ema must be from 0 to 1, not {self.ema}")
        for name in ("lr", "eps", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or more and finite, not {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be from 0 to below 1, not {self.betas}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be above 0, or None to switch clipping off, not {self.max_grad_norm}")

    def of_all_ranks(self) -> dict[str, object]:
        """Options that must be the same on all data-parallel ranks.

        Left out are batches, options that change no result, and the learning rate, since a scheduler changes it.
        """
        own = {"lr", "offload", "accumulation_steps", "reprobe"}
        shared = {name: value for name, value in vars(self).items() if name not in own}
        return {**shared, "reprobe": self.reprobe is not False}

    @property
    def refresh(self) -> int:
        """T_u, resolved."""
        return self.sample_every if self.refresh_every is None else self.refresh_every

    def wanted_layers(self, layers: int) -> float:
        """Effective number of layers, of `layers`, that `temperature="auto"` aims at; `layers` means uniform draws."""
        # a hair more than active_layers + 1, so that rounding does not read as a collapse
        return min(float(layers), max(self.target * layers, (self.active_layers + 1) * (1 + 1e-9)))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the moments."""
        return STATE_DTYPES[self.state_dtype]

    def check_model(self, layers: int, *, frozen: int, parameters: Mapping[str, nn.Parameter]) -> None:
        """Reject options that are invalid for this model.

        Args:
            layers: decoder layers.
            frozen: how many of them the user froze.
            parameters: all that the user did not freeze, by name.

        Raises:
            ValueError: more active layers than layers, a parameter without a flat view, or nothing to round
                stochastically.
        """
        if self.active_layers > layers - frozen:
            which = f"{layers} layers, less {frozen} frozen ones" if frozen else "layers"
            raise ValueError(
                f"active_layers must be from 1 to {layers - frozen} (the model's {which}), not {self.active_layers}"
            )
        for name, parameter in parameters.items():
            if not parameter.is_contiguous():
                raise ValueError(f"the parameter {name} is not contiguous: set its .data to .data.contiguous()")
        if self.stochastic_rounding and self.state_dtype != "bf16":
            dtypes = {p.dtype for p in parameters.values()}
            if torch.bfloat16 not in dtypes:
                raise ValueError(
                    f"stochastic_rounding has nothing to round: weights are {', '.join(sorted(map(str, dtypes)))} "
                    f"and moments {self.state_dtype}; it is for bf16 weights or state_dtype='bf16'"
                )
