"""SPEFT: AdamW on the most salient entries of the linear weights, chosen once (arXiv 2412.13488, ACL 2025).

Before training, every entry of the decoder layers' linear weights gets a salience. The k largest over all matrices
train throughout; everything else is frozen. The paper finds that plain gradient salience with such a static mask does
as well as any other. Salience, as in the authors' code (0-ml/speft, model/sparse_peft.py), where g is the gradient
*averaged over batches before* its absolute value is taken, so that signs cancel:

    gradient   |g|                    snip        |w g| (the code's `saliency`)
    fisher     mean of the squared gradients of single rows, a batch being cut into micro-batches of one row
    magnitude  |w|                    random      a random set

From the code: global top-k (`sparse_global_topk`), k a count or a share of all entries, rounded down. Ours: gradients
are summed in fp32; each batch is weighted by its label tokens, so that the choice does not depend on the micro-batch
size. The code trains deltas beside the weights; here the entries themselves train, which is the same except for weight
decay (it pulls an entry, or its delta, to 0) and rounding.

Cost: during scoring, `layers_together` decoder layers at a time have fp32 sums of gradients, in addition to one
matrix's scores and the k best so far (12 bytes each, up to five times that while they are merged). All batches run once
for every such set of layers, with backward down to its lowest layer: with L layers one by one and n batches, that is L
n forward passes and about half as many full backward passes; `magnitude` and `random` run none. In training, a matrix's
dense gradient is alive until a backward hook gathers its chosen entries; from then on gradients, moments and indices
take k entries each. Micro-batches accumulate in these entries, and the recipe's clipping applies to them.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from baselines.matrices import gradients_used_up, weights_of
from baselines.method import (
    Calibration,
    Expectation,
    LayerTrace,
    Method,
    ModelFacts,
    Options,
    StepFacts,
    adamw,
    host_number,
    moment_bytes,
    torch_dtype,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import torch
    from torch import Tensor, nn

    from baselines.method import Batch, Recipe

INDEX_BYTES = 4
NO_LABEL = -100


class SpeftOptions(Options):
    """SPEFT's block in the config."""

    k: int | None = Field(default=None, gt=0, description="entries that train; the authors' 7B script: 40,370,176")
    density: float | None = Field(default=None, gt=0, le=1, description="the same as a share of all linear entries")
    salience: Literal["gradient", "snip", "fisher", "magnitude", "random"] = "gradient"
    calibration_rows: int = Field(default=256, gt=0, description="that salience is measured on, in whole micro-batches")
    layers_together: int = Field(default=1, gt=0, description="layers measured in one pass over these rows; ours")

    @model_validator(mode="after")
    def _one_size(self) -> SpeftOptions:
        if (self.k is None) == (self.density is None):
            raise ValueError("give one of k and density, the number of entries that train or their share")
        return self


class Speft(Method):
    """Trains a fixed, sparse set of single weights."""

    Config = SpeftOptions
    PAPER = "arXiv 2412.13488"
    EXAMPLES = (
        {"density": 0.05, "calibration_rows": 16},
        {"k": 2000, "salience": "fisher", "calibration_rows": 8, "layers_together": 3},
        {"density": 0.3, "salience": "random"},
    )
    options: SpeftOptions

    def __init__(self, options: Options, *, recipe: Recipe, lr: float, seed: int) -> None:
        super().__init__(options, recipe=recipe, lr=lr, seed=seed)
        self._gradients: dict[nn.Parameter, Tensor] = {}
        """Gradients of the chosen entries, by matrix, accumulated over this step's backward passes so far."""
        self._gathering = False
        self._chosen = LayerTrace(active=())

    def skip(self, facts: ModelFacts) -> str | None:
        """Skip if there are fewer entries than are to train."""
        entries = sum(facts.layer_parameters)
        if self.options.k is not None and self.options.k > entries:
            return f"k {self.options.k} is above the {entries} parameters of the model's layers"
        return None

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze everything; `prepare` decides what trains.

        Raises:
            ValueError: k is above the number of linear entries.
        """
        self.model = model.requires_grad_(False)
        self.layers = weights_of(model)
        entries = sum(p.numel() for layer in self.layers for p in layer.values())
        self.k = self.options.k or max(1, int((self.options.density or 0) * entries))
        if self.k > entries:
            raise ValueError(f"k {self.k} is above the {entries} entries of the linear weights: lower it")
        self.optimizer = adamw([p for layer in self.layers for p in layer.values()], self.recipe, self.lr)
        return model

    def prepare(self, calibration: Calibration) -> None:
        """Score every entry, keep the k best over all matrices, and create their states."""
        import torch

        assert self.optimizer is not None
        places, first, dtype = self._best_places(calibration), 0, torch_dtype(self.recipe.state_dtype)
        weights = [p for layer in self.layers for p in layer.values()]
        for weight, inside in zip(weights, places.split(_counts(places, [p.numel() for p in weights])), strict=True):
            if len(inside):
                moments = torch.zeros(len(inside), dtype=dtype, device=weight.device)
                index = (inside - first).to(torch.int32)
                self.optimizer.state[weight] = {
                    "step": 0, "exp_avg": moments, "exp_avg_sq": moments.clone(), "index": index,
                }  # fmt: skip
            first += weight.numel()
        self._train_chosen()

    def begin_step(self, step: int) -> None:
        """The embedding is frozen, so let backward stop before it."""
        from grass.backward import stop_at_lowest_layer

        assert self.model is not None
        stop_at_lowest_layer(self.model)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Gather the gradients of the chosen entries; hooks drop the rest at once."""
        self._gathering = True
        try:
            loss.backward()
        finally:
            self._gathering = False

    def end_step(self, replay: Callable[[], Iterator[Tensor]]) -> StepFacts:
        """Clip and update the chosen entries."""
        import torch

        from grass.adamw import Entries, flat, update_pieces

        assert self.optimizer is not None
        gradients, self._gradients = self._gradients, {}
        limit, norm = self.recipe.max_grad_norm, torch.nn.utils.get_total_norm(list(gradients.values()))
        (group,) = self.optimizer.param_groups
        with torch.no_grad():
            for weight, gradient in gradients.items():
                if limit is not None:
                    gradient.mul_((limit / (norm + 1e-6)).clamp(max=1.0))
                state = self.optimizer.state[weight]
                state["step"] += 1
                entries = flat(weight).index_select(0, state["index"])
                moments = state["exp_avg"], state["exp_avg_sq"]
                update_pieces([Entries(entries, gradient, *moments, state["step"])], group)
                weight.view(-1).index_copy_(0, state["index"].long(), entries)
        # drop gradients from backward passes other than `backward`
        self.optimizer.zero_grad(set_to_none=True)
        measured = host_number(norm)
        return StepFacts(grad_norm=measured, clipped=limit is not None and measured > limit)

    def trace(self) -> LayerTrace:
        """Matrices with chosen entries; a layer's importance is the share of its linear entries that was chosen."""
        return self._chosen

    def expect(self, facts: ModelFacts) -> Expectation:
        """Matrices that hold chosen entries move, always the same ones; no dense gradient outlives backward."""
        return Expectation(
            layers="chosen",
            rotates=False,
            gradients="consumed",
            trainable_parameters=self.k,
            state_of="constant",
            state_bytes=self.k * (moment_bytes(self.recipe) + INDEX_BYTES),
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the optimizer's states, which also hold the indices of the chosen entries."""
        super().load_state_dict(state)
        self._train_chosen()

    @property
    def _measures(self) -> bool:
        return self.options.salience in ("gradient", "snip", "fisher")

    def _best_places(self, calibration: Calibration) -> Tensor:
        """Indices of the k best entries, ascending, in the concatenation of all flattened matrices."""
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        best, first = Best(self.k), 0
        for lowest in range(0, len(self.layers), self.options.layers_together):
            together = self.layers[lowest : lowest + self.options.layers_together]
            matrices = [p for layer in together for p in layer.values()]
            means = self._mean_gradients(matrices, calibration) if self._measures else [None] * len(matrices)
            for weight, mean in zip(matrices, means, strict=True):
                best.offer(salience(self.options.salience, weight.detach(), mean, generator), first)
                first += weight.numel()
        return best.places.sort().values

    def _mean_gradients(self, matrices: Sequence[nn.Parameter], calibration: Calibration) -> list[Tensor]:
        """Gradient of the mean loss per label token (`fisher`: mean of squares over rows) of each matrix, fp32."""
        import torch

        from grass.backward import checkpointed

        assert self.model is not None
        rows_apart = self.options.salience == "fisher"
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in matrices]
        total: Any = 0

        def add(number: int, gradient: Tensor) -> None:
            sums[number].add_(gradient.square() if rows_apart else gradient)

        with gradients_used_up(matrices, add), checkpointed(self.model):
            for batch in calibration.batches(-(-self.options.calibration_rows // self.recipe.micro_batch_size)):
                for part in _rows(batch) if rows_apart else (batch,):
                    weight = 1 if rows_apart else (part["labels"][:, 1:] != NO_LABEL).sum()
                    (calibration.loss(self.model, part) * weight).backward()
                    total = total + weight
        return [added.div_(total) for added in sums]

    def _train_chosen(self) -> None:
        """Let matrices with chosen entries have gradients, and record these matrices in the trace."""
        assert self.optimizer is not None
        states = self.optimizer.state
        for layer in self.layers:
            for weight in layer.values():
                if weight in states:
                    weight.requires_grad_(True)
                    weight.register_post_accumulate_grad_hook(self._gather)

        def chosen(layer: dict[str, nn.Parameter]) -> int:
            return sum(states[p]["index"].numel() for p in layer.values() if p in states)

        self._chosen = LayerTrace(
            active=tuple(number for number, layer in enumerate(self.layers) if chosen(layer)),
            tensors=tuple(name for layer in self.layers for name, p in layer.items() if p in states),
            importance=tuple(chosen(layer) / sum(p.numel() for p in layer.values()) for layer in self.layers),
        )

    def _gather(self, parameter: Any) -> None:
        """Hook: keep the chosen entries of the completed gradient, and free the rest."""
        from grass.adamw import flat

        if self._gathering:
            assert self.optimizer is not None
            gradient, parameter.grad = parameter.grad, None
            entries = flat(gradient).index_select(0, self.optimizer.state[parameter]["index"])
            before = self._gradients.get(parameter)
            self._gradients[parameter] = entries if before is None else before.add_(entries)


class Best:
    """The k largest of all scores offered so far, and their indices."""

    def __init__(self, k: int) -> None:
        self._k = k
        self._scores: Tensor | None = None
        self.places: Tensor

    def offer(self, scores: Tensor, first: int) -> None:
        """Offer the flattened scores of one matrix, whose first entry has the index `first`."""
        import torch

        values, places = scores.topk(min(self._k, scores.numel()))
        places += first
        if self._scores is not None:
            values, places = torch.cat([self._scores, values]), torch.cat([self.places, places])
            if len(values) > self._k:
                values, kept = values.topk(self._k)
                places = places[kept]
        self._scores, self.places = values, places


def salience(name: str, weight: Tensor, measured: Tensor | None, generator: torch.Generator) -> Tensor:
    """Scores of all entries of one matrix, flat, in fp32.

    Args:
        name: which salience.
        weight: any shape.
        measured: the weight's mean gradient, or mean squared gradient for `fisher`; None if not needed.
        generator: CPU generator for `random`.
    """
    import torch

    if name == "random":
        return torch.rand(weight.numel(), generator=generator).to(weight.device)
    if name == "magnitude":
        return weight.float().abs().flatten()
    assert measured is not None
    return (measured * weight.float() if name == "snip" else measured).abs().flatten()


def _counts(places: Tensor, sizes: Sequence[int]) -> list[int]:
    """How many of the indices `places` lie in each matrix; if they have no values (a forecast), an even share."""
    ends, k = list(accumulate(sizes)), len(places)
    below = [int(host_number((places < end).sum())) for end in ends]
    if below[-1] != k:
        below = [k * end // ends[-1] for end in ends]
    return [count - before for before, count in pairwise([0, *below])]


def _rows(batch: Batch) -> Iterator[Batch]:
    for row in range(len(batch["input_ids"])):
        yield {key: value[row : row + 1] for key, value in batch.items()}
