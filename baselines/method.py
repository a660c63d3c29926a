"""The contract between the harness and every fine-tuning method; the only file that all methods share.

A method is a module in this package that defines exactly one subclass of `Method`. The harness finds it by the module's
name in a config entry. The harness owns the clock, the memory meters, the learning-rate schedule, the data order and
the seeds; the method decides which parameters move, and how. Importing a method's module must not import torch, so that
a study can be planned in seconds: import torch inside the functions that need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    Batch = Mapping[str, Tensor]


class Strict(BaseModel):
    """Base of every configuration model: unknown keys and wrong types are errors, values never change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def later(default: Any, **limits: Any) -> Any:
    """A key that came after names of jobs were in use: where it has its default, a job's spec and name leave it out.

    Args:
        default: the value that says what jobs did before the key existed.
        limits: as for pydantic's `Field`.
    """
    return Field(default=default, exclude_if=lambda value: value == default, **limits)


class Options(Strict):
    """Base of a method's own block in the config. Importable without torch."""


class Recipe(Strict):
    """How a run trains, whatever the method: one recipe for all methods of a study, or a mark in every table."""

    steps: int = Field(gt=0, description="optimizer steps")
    batch_size: int = Field(gt=0, description="rows per optimizer step")
    micro_batch_size: int = Field(gt=0, description="rows per forward pass; divides batch_size")
    max_length: int = Field(gt=0, description="tokens a row is cut to, prompt and answer together")
    loss_on: Literal["answer", "all"] = Field(description="'answer' masks the prompt out of the loss")
    warmup_steps: int = Field(ge=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_grad_norm: float | None = Field(gt=0, description="global-norm clipping; null switches it off")
    weight_decay: float = Field(default=0.0, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_dtype: Literal["fp32", "bf16"] = "fp32"
    compute_dtype: Literal["fp32", "bf16"] | None = later(
        None, description="of matrix products: bf16 is autocast over fp32 weights; null computes in weight_dtype"
    )
    state_dtype: Literal["fp32", "bf16", "int8"] = Field(
        default="fp32", description="dtype of the optimizer's moments; int8: codes with a scale for every 256 of them"
    )
    stochastic_rounding: bool = later(
        False, description="bf16 weights and bf16 second moments are rounded up or down at random, right on average"
    )
    activation_checkpointing: bool = False
    chunked_loss: bool = later(False, description="the head is applied to some tokens at a time: logits take no memory")
    device: Literal["cpu", "cuda"] = "cpu"

    @model_validator(mode="after")
    def _something_is_rounded(self) -> Recipe:
        if self.stochastic_rounding and "bf16" not in (self.weight_dtype, self.state_dtype):
            raise ValueError(
                f"stochastic_rounding has nothing to round: weight_dtype is {self.weight_dtype} and state_dtype "
                f"{self.state_dtype}; it is for bf16"
            )
        return self

    @property
    def autocast(self) -> bool:
        """Whether forward passes run in bf16 autocast, which is for fp32 weights: bf16 ones need none."""
        return self.compute_dtype == "bf16" and self.weight_dtype == "fp32"

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches per optimizer step."""
        return self.batch_size // self.micro_batch_size


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Facts about a model before any method changes it: parameter counts, no weights."""

    architecture: str
    layer_parameters: tuple[int, ...]
    """Parameters of each decoder layer, bottom first."""
    embedding_parameters: int
    """Input embedding (and any other parameter below the decoder stack)."""
    head_parameters: int
    """Language-model head; 0 if it is tied to the embedding."""
    final_norm_parameters: int
    hidden_size: int
    tied_embeddings: bool
    tensor_parameters: Mapping[str, int] = field(default_factory=dict)
    """Size of each parameter tensor, by its name in the untouched model, in the model's own order."""
    layer_tensors: tuple[tuple[int, ...], ...] = ()
    """Size of each parameter tensor of each decoder layer."""
    outside_tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The same of `embedding`, `final_norm` and `head`."""

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layer_parameters)

    @property
    def total_parameters(self) -> int:
        """All parameters, a tied head counted once."""
        return sum(self.layer_parameters) + self.outside_parameters(embedding=True, head=True, final_norm=True)

    def outside_parameters(self, *, embedding: bool, head: bool, final_norm: bool) -> int:
        """Parameters of these groups outside the decoder layers together."""
        return (
            self.embedding_parameters * embedding
            + self.head_parameters * head
            + self.final_norm_parameters * final_norm
        )


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What a run must do. The harness compares this with its own observations; see `harness.training.engagement`.

    Bytes of optimizer state are given as a formula, `state_bytes_per_parameter` times the parameters of `state_of`,
    since layers differ in size and the set of visited layers is known only afterwards.
    """

    layers: Literal["none", "all", "sampled", "chosen"]
    """Which decoder layers (base weights or the adapters in them) move. `chosen`: single parameter tensors, inside or
    outside layers, which `LayerTrace.tensors` names for each period; the flags of the three groups below are then
    ignored."""
    active_layers: int | None = None
    """`sampled`: how many layers move in every period."""
    period_steps: int | None = None
    """`sampled`, `chosen`: steps between two draws."""
    rotates: bool = True
    """`sampled`, `chosen`: False if the method may keep its choice for the rest of the run."""
    embedding: bool = False
    head: bool = False
    final_norm: bool = False
    base_frozen: bool = False
    """Adapters: the model's own weights stay bitwise equal."""
    gradients: Literal["kept", "consumed"] = "kept"
    """`consumed`: backward uses and frees every gradient as it appears, so none is left when a step ends."""
    trainable_parameters: int
    """Parameters trained in one step (the largest count if layers differ in size; `chosen`: an upper bound)."""
    layer_trained_parameters: tuple[int, ...] | None = None
    """`sampled`, `all`: parameters that train in each layer while it is active, if they are not the layer's own
    (adapters); a layer with 0 never moves."""
    state_bytes_per_parameter: int = 0
    state_in_8_bits: bool = False
    """Larger tensors have packed moments instead (`grass.quantised`)."""
    state_of: Literal["none", "active", "visited", "constant"]
    """`active`: state exists only for parameters that train now; `visited`: also for layers that trained before;
    `constant`: `state_bytes` at any time."""
    layer_state_bytes: tuple[int, ...] | None = None
    """`sampled`: bytes of each layer's state, if they do not follow from the layer's size (adapters, projections)."""
    state_bytes: int | None = None
    """`constant`: all bytes of state."""

    def state_bytes_of_layers(self, facts: ModelFacts) -> tuple[int, ...]:
        """Bytes of each decoder layer's state, by the formula."""
        if self.state_in_8_bits:
            return tuple(sum(map(packed_moments_bytes, sizes)) for sizes in facts.layer_tensors)
        return tuple(count * self.state_bytes_per_parameter for count in facts.layer_parameters)

    def state_bytes_outside(self, facts: ModelFacts) -> int:
        """Bytes of state of what trains outside the decoder layers, by the formula."""
        trained = {"embedding": self.embedding, "head": self.head, "final_norm": self.final_norm}
        if self.state_in_8_bits:
            return sum(packed_moments_bytes(n) for key, on in trained.items() if on for n in facts.outside_tensors[key])
        return facts.outside_parameters(**trained) * self.state_bytes_per_parameter


@dataclass(frozen=True, kw_only=True)
class LayerTrace:
    """State of a layer-wise method at the start of a step; the same for all methods, one entry per decoder layer."""

    active: tuple[int, ...]
    """Layers that train in this step, wholly or in part."""
    tensors: tuple[str, ...] | None = None
    """If single tensors are chosen: names, as in the original model, of those that train in this step."""
    importance: tuple[float, ...] | None = None
    probability: tuple[float, ...] | None = None
    age_steps: tuple[int, ...] | None = None
    """Steps since each layer's importance was last measured."""
    temperature: float | None = None
    """Of the softmax that gave `probability`; None if there is none, or if it is uniform whatever the importance."""


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """Result of `Method.end_step`; None for values that the method does not know."""

    grad_norm: float | None
    """Global norm of the trained parameters' gradients, before clipping."""
    clipped: bool | None


class Calibration(Protocol):
    """Batches that the harness supplies, replays and times for `Method.prepare`; they are not taken from training."""

    def batches(self, count: int) -> Iterator[Batch]:
        """The first `count` calibration batches, the same ones at every call.

        Several processes share them if they can be shared evenly; otherwise each of them gets all.
        """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean training loss of one batch (scalar), with the run's own loss mask."""


class Method:
    """One fine-tuning method. Subclasses set `Config` and override what differs from plain AdamW on `self.trained`."""

    Config: ClassVar[type[Options]] = Options
    REQUIRES: ClassVar[tuple[str, ...]] = ()
    """Optional packages; a missing one makes the run `skipped`, with the package named."""
    PAPER: ClassVar[str] = ""
    TRAINS: ClassVar[bool] = True
    """False: no step is taken, so there is no learning rate to search."""
    RANKS: ClassVar[bool] = False
    """True: several processes, each with its share of a step's micro-batches, may train one model together: they update
    by gradients averaged over them, as `end_step` below does, and `prepare` averages what it measures. Otherwise a run
    that asks for several is `skipped`."""
    ADAMW: ClassVar[bool] = False
    """True: all that has state are tensors of the model, updated by `grass.adamw`, and `expect` says whether it is in
    8 bits. Otherwise a recipe with `state_dtype: int8` or with `stochastic_rounding` is `skipped`."""

    EXAMPLES: ClassVar[tuple[dict[str, Any], ...]] = ({},)
    """Options with which the contract suite tries this method on a model of 4 layers and width 32, in 12 steps."""
    EXAMPLE_RECIPE: ClassVar[dict[str, Any]] = {}
    """Recipe settings that the method needs in the suite, such as no clipping; `skip` rejects studies without them."""
    EXAMPLE_LR: ClassVar[float] = 3e-3
    """Learning rate of the suite's runs; override it if AdamW's would change weights too little or too much."""

    def __init__(self, options: Options, *, recipe: Recipe, lr: float, seed: int) -> None:
        """`lr` is the peak learning rate; `seed` is for draws that are the method's own."""
        self.options = options
        self.recipe = recipe
        self.lr = lr
        self.seed = seed
        self.optimizer: torch.optim.Optimizer | None = None
        self.model: nn.Module | None = None
        self.calibration: Calibration | None = None
        """Set by the harness before the first step, in a resumed run as well; for methods that measure again later."""

    def skip(self, facts: ModelFacts) -> str | None:
        """Reason why this method cannot run its recipe on this model, or None."""
        return None

    def expect(self, facts: ModelFacts) -> Expectation:
        """What the run must do, as the harness will check it."""
        raise NotImplementedError(f"{type(self).__name__} promises nothing: write expect()")

    def attach(self, model: nn.Module) -> nn.Module:
        """Wrap or freeze `model`, build the optimizer, return the module to train.

        Every parameter of `model` requires a gradient: what its architecture keeps frozen is no parameter any more.
        """
        raise NotImplementedError

    def prepare(self, calibration: Calibration) -> None:
        """Everything that needs batches before the first step: probing, salience, outlier scores."""

    def begin_step(self, step: int) -> None:
        """Called before the first forward pass of optimizer step `step` (counted from 0); freeze and draw here."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Backward of one micro-batch, with its loss already divided; `last` marks the step's last one."""
        loss.backward()

    def end_step(self, replay: Callable[[], Iterator[Tensor]]) -> StepFacts:
        """Average over processes, clip, update, free gradients. `replay()` yields this step's losses once more."""
        import torch

        from grass.distributed import average_gradients

        assert self.optimizer is not None
        average_gradients([p for group in self.optimizer.param_groups for p in group["params"]])
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        limit = self.recipe.max_grad_norm
        norm = host_number(torch.nn.utils.clip_grad_norm_(parameters, limit if limit is not None else float("inf")))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepFacts(grad_norm=norm, clipped=limit is not None and norm > limit)

    def set_lr_factor(self, factor: float) -> None:
        """Apply the schedule: every group's learning rate becomes its own base rate times `factor`."""
        if self.optimizer is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor

    def trace(self) -> LayerTrace | None:
        """State of a layer-wise method, read after `begin_step`; None for methods that do not choose layers."""
        return None

    def pinned_bytes(self) -> int | None:
        """Bytes of pinned host memory that the method holds now, by the sizes of its buffers; None if unknown.

        The kernel may count pinned memory as shared, as the driver's, or not at all, so only its owner knows.
        """
        return None

    def sleeps_on_host(self) -> bool:
        """Whether moments of what sleeps are sure to be kept in host memory on a GPU, and not only if they must be."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Everything besides the weights that a bit-exact resume needs."""
        return {} if self.optimizer is None else {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`, on a freshly attached method."""
        if self.optimizer is not None:
            self.optimizer.load_state_dict(state["optimizer"])

    def export(self, path: Path) -> None:
        """Write a model folder that plain transformers loads (adapters merged first)."""
        assert self.model is not None
        self.model.save_pretrained(path)  # type: ignore[operator]


def tied_conflict(facts: ModelFacts, *, embedding: bool, head: bool) -> str | None:
    """Reason to skip if only one of embedding and head is to train but this model ties them; otherwise None."""
    if not facts.tied_embeddings or embedding == head:
        return None
    on, off = ("embedding", "head") if embedding else ("head", "embedding")
    return f"the model's head is tied to its embedding: it cannot train the {on} and leave the {off} out"


def adamw(parameters: Sequence[Any], recipe: Recipe, lr: float, *, seed: int = 0) -> torch.optim.Optimizer:
    """AdamW with the recipe's settings, over parameters or parameter groups: the same update for every method.

    `seed` is that of stochastic rounding.
    """
    from grass.adamw import AdamW

    return AdamW(
        parameters,
        lr=lr,
        betas=recipe.betas,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        state_dtype=torch_dtype(recipe.state_dtype),
        stochastic_rounding=recipe.stochastic_rounding,
        seed=seed,
    )


def precision_conflict(method: type[Method], recipe: Recipe) -> str | None:
    """Reason to skip if the recipe's number formats are not for this method; otherwise None."""
    if method.ADAMW or not method.TRAINS:
        return None
    if recipe.state_dtype == "int8":
        return "state_dtype int8: this method keeps state of its own, in fp32 or bf16"
    if recipe.stochastic_rounding:
        return "stochastic_rounding: this method has updates of its own, which round to nearest"
    return None


def host_number(value: Tensor) -> float:
    """Value of a device scalar, read through the current host (`grass.host`); waits for the device.

    Methods must read device values only through this function. If tensors have no values (a memory forecast), it
    returns 1.0, so nothing that determines memory may depend on it. For the same reason, layers must be drawn with
    `grass.sampling.draw_layers`.
    """
    from grass.host import current

    return current().number(value)


def torch_dtype(name: Literal["fp32", "bf16", "int8"]) -> torch.dtype:
    """The torch dtype for a short name in the config; that of packed moments for int8."""
    from grass.options import STATE_DTYPES

    return STATE_DTYPES[name]


def moment_bytes(recipe: Recipe) -> int:
    """Bytes of AdamW's two moments for one parameter; with int8, of a tensor too small to be packed."""
    return {"fp32": 8, "bf16": 4, "int8": 8}[recipe.state_dtype]


def packed_moments_bytes(entries: int) -> int:
    """Bytes of AdamW's two moments of one tensor under `state_dtype: int8`."""
    from grass.quantised import PACKED, moment_bytes, stored_dtype

    return 2 * moment_bytes(entries, stored_dtype(entries, PACKED))
