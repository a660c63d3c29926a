"""OWS, first named OwLore: layers drawn by their share of outliers (arXiv 2405.18380, ACL 2025 Findings).

Every K steps gamma decoder layers are drawn without replacement by fixed probabilities p_l = D_l / sum D. The drawn
layers, embedding and head train; moments of sleeping layers are kept (paper, and pixeli99/OwLore). D_l is the share of
outliers among the entries of layer l's linear matrices: entry (i, j) scores |W_ij| times the l2 norm of input feature j
over the calibration rows, and is an outlier if its score exceeds M times the *mean score of the layer*. That mean is
over all matrices of the layer together, as in OWL's code (luuyin/OWL, lib/prune_all.py, `check_outlier_mean` of the
concatenated scores), from which the paper takes the measure; the OwLore repository does not include it.

Ours: calibration rows are training rows (OWL: 128 rows of C4), and padding does not count. If no layer has an outlier,
as for random weights at M = 13, probabilities fall back to uniform with a warning: the method is then LISA with kept
states. If other layers have outliers, a layer with D_l = 0 is drawn only when these are fewer than gamma; the authors'
numpy draw would raise there. If no more than gamma layers have outliers (a model of 0.4 M parameters has a single one,
in two layers, at M = 13), these train in every period, and a warning says so. The final norm trains too: LMFlow's code,
on which OwLore builds, freezes only layers.

`projected` gives the authors' low-rank variant: the linear matrices of the layers train as in `baselines.galore`. It
keeps a pitfall of theirs: a matrix is projected again every `update_gap` steps of its *own* count, so a layer that is
drawn again continues with the projection of its last visit, however old, until its count reaches the next multiple.
GRASS's tables do not say which of the two variants they compare with.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from pydantic import Field

from baselines.galore import project_gradients, projected_bytes
from baselines.matrices import linears_of, matrices_of, rank_too_large
from baselines.method import (
    Calibration,
    Expectation,
    LayerTrace,
    Method,
    ModelFacts,
    Options,
    adamw,
    host_number,
    moment_bytes,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from baselines.method import Recipe

ROWS_AT_ONCE = 1024
"""Rows of a matrix whose scores are alive at once."""


class OwsOptions(Options):
    """OWS's block in the config."""

    active_layers: int = Field(default=5, gt=0, description="gamma; the authors' scripts use 5")
    sample_every: int = Field(default=50, gt=0, description="K, steps between two draws; the authors' scripts use 50")
    outlier_factor: float = Field(default=13.0, gt=0, description="M; 13 by the name of the authors' score file")
    calibration_rows: int = Field(default=128, gt=0, description="for the feature norms, in whole micro-batches; OWL's")
    projected: bool = Field(default=False, description="GaLore's projection in the drawn layers")
    rank: int = Field(default=256, gt=0, description="of the projection; the authors' script uses 256")
    update_gap: int = Field(default=100, gt=0, description="of the projection; the authors' script uses 100")
    scale: float = Field(default=1.0, gt=0, description="of the projection; the authors' script uses 1.0")


class Ows(Method):
    """Embedding, final norm and head always train; `active_layers` layers are drawn by their share of outliers."""

    Config = OwsOptions
    PAPER = "arXiv 2405.18380"
    EXAMPLES = (
        {"active_layers": 2, "sample_every": 4, "outlier_factor": 3.0, "calibration_rows": 16},
        {"active_layers": 1, "sample_every": 3, "calibration_rows": 8},
        {
            "active_layers": 2, "sample_every": 3, "outlier_factor": 3.0, "calibration_rows": 16,
            "projected": True, "rank": 4, "update_gap": 4,
        },
    )  # fmt: skip
    options: OwsOptions

    def __init__(self, options: Options, *, recipe: Recipe, lr: float, seed: int) -> None:
        super().__init__(options, recipe=recipe, lr=lr, seed=seed)
        self.active: tuple[int, ...] = ()
        self.outlier_share: tuple[float, ...] = ()
        """D, one number per decoder layer, from 0 to 1."""

    def skip(self, facts: ModelFacts) -> str | None:
        """Skip if more layers are to be active than exist, or if the rank is above a matrix's smaller side."""
        if self.options.active_layers > facts.layers:
            return f"active_layers {self.options.active_layers} is above the model's {facts.layers} layers"
        return rank_too_large(self.options.rank, facts) if self.options.projected else None

    def attach(self, model: nn.Module) -> nn.Module:
        """Build the optimizer over everything *before* freezing: otherwise layers drawn later would never move."""
        import torch

        from grass.layers import find_layers

        self.model = model
        self.layer_parameters = find_layers(model).layer_parameters()
        self.generator = torch.Generator().manual_seed(self.seed)
        self.optimizer = adamw(list(model.parameters()), self.recipe, self.lr)
        self.matrices = matrices_of(model) if self.options.projected else []
        if self.options.projected:
            project_gradients(
                self.optimizer,
                self.matrices,
                rank=self.options.rank,
                update_gap=self.options.update_gap,
                scale=self.options.scale,
            )
        return model

    def prepare(self, calibration: Calibration) -> None:
        """Measure D once for the whole run: only forward passes, one vector of norms per matrix, scores in pieces."""
        assert self.model is not None
        linears = linears_of(self.model)
        squares = squared_feature_norms(
            self.model, linears, calibration, -(-self.options.calibration_rows // self.recipe.micro_batch_size)
        )
        shares = []
        for layer in linears:
            # a linear module whose weight the model uses without calling it (in a Mamba layer) has seen no features
            scored = [(_rows_of_outputs(m), squares[name].sqrt()) for name, m in layer.items() if name in squares]
            shares.append(host_number(outlier_share(scored, self.options.outlier_factor)))
        self.outlier_share = tuple(shares)
        having = sum(share > 0 for share in shares)
        if having <= self.options.active_layers < len(shares):
            follows = "the same layers train in every period" if having else "layers are drawn uniformly"
            warnings.warn(
                f"OWS found outliers in {having} of {len(shares)} layers at outlier_factor "
                f"{self.options.outlier_factor:g}, so {follows}; lower it to change that",
                stacklevel=2,
            )

    @property
    def probability(self) -> tuple[float, ...]:
        """p, proportional to D; uniform if every D is 0."""
        total = sum(self.outlier_share)
        return tuple(d / total if total else 1 / len(self.outlier_share) for d in self.outlier_share)

    def begin_step(self, step: int) -> None:
        """Draw at step 0 and every `sample_every` steps."""
        from grass.sampling import draw_layers

        if step % self.options.sample_every == 0:
            self.active = draw_layers(self.probability, self.options.active_layers, self.generator)
            self._freeze()

    def trace(self) -> LayerTrace:
        """Importance is D."""
        return LayerTrace(active=self.active, importance=self.outlier_share, probability=self.probability)

    def expect(self, facts: ModelFacts) -> Expectation:
        """Drawn layers move in their period; every layer visited so far has state."""
        largest = sorted(facts.layer_parameters)[-self.options.active_layers :]
        outside = facts.total_parameters - sum(facts.layer_parameters)
        return Expectation(
            layers="sampled",
            active_layers=self.options.active_layers,
            period_steps=self.options.sample_every,
            embedding=True,
            head=True,
            final_norm=True,
            trainable_parameters=sum(largest) + outside,
            state_bytes_per_parameter=moment_bytes(self.recipe),
            state_of="visited",
            layer_state_bytes=self._layer_state_bytes(),
        )

    def state_dict(self) -> dict[str, Any]:
        """Moments and projections, D, the drawn layers and the generator."""
        return {
            **super().state_dict(),
            "active": self.active,
            "outlier_share": self.outlier_share,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; freezes again."""
        super().load_state_dict(state)
        self.active, self.outlier_share = tuple(state["active"]), tuple(state["outlier_share"])
        self.generator.set_state(state["generator"])
        self._freeze()

    def _freeze(self) -> None:
        from grass.layers import set_trainable

        for layer, parameters in enumerate(self.layer_parameters):
            set_trainable(parameters, layer in self.active)

    def _layer_state_bytes(self) -> tuple[int, ...]:
        low = {id(p): projected_bytes(p, self.options.rank, self.recipe) for p in self.matrices}
        plain = moment_bytes(self.recipe)
        return tuple(sum(low.get(id(p), p.numel() * plain) for p in layer) for layer in self.layer_parameters)


def squared_feature_norms(
    model: nn.Module, linears: Sequence[dict[str, nn.Module]], calibration: Calibration, batches: int
) -> dict[str, Tensor]:
    """Sum of squares of every input feature of every linear over the tokens of `batches` batches, padding left out.

    Returns:
        fp32 vectors of shape (inputs,), by the name of the linear's weight.
    """
    import torch

    squares: dict[str, Tensor] = {}
    mask: list[Tensor] = []

    def adds_up(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            x = inputs[0].float()
            # experts of a mixture get tokens without their rows, so the padding mask does not apply
            kept = x * mask[0].unsqueeze(-1) if x.shape[:-1] == mask[0].shape else x
            total = kept.flatten(0, -2).square().sum(0)
            squares[name] = squares[name] + total if name in squares else total

        return hook

    handles = [m.register_forward_hook(adds_up(name)) for layer in linears for name, m in layer.items()]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in calibration.batches(batches):
                mask[:] = [batch["attention_mask"]]
                calibration.loss(model, batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return squares


def outlier_share(scored: Sequence[tuple[Tensor, Tensor]], factor: float) -> Tensor:
    """D of one layer: the share of its entries whose score exceeds `factor` times the layer's mean score.

    Args:
        scored: for each matrix of the layer, its weight (outputs, inputs) and the norms of its inputs (inputs,), fp32.
        factor: M.

    Returns:
        Scalar, fp32, on the weights' device.
    """
    import torch

    count = sum(weight.numel() for weight, _ in scored)
    mean = torch.stack([score.sum() for score in _scores(scored)]).sum() / count
    return torch.stack([(score > factor * mean).sum() for score in _scores(scored)]).sum() / count


def _scores(scored: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    for weight, norms in scored:
        for rows in weight.detach().split(ROWS_AT_ONCE):
            yield rows.float().abs() * norms


def _rows_of_outputs(module: Any) -> Tensor:
    """A linear's weight as (outputs, inputs); GPT-2's `Conv1D` stores it transposed."""
    from torch import nn

    weight: Tensor = module.weight
    return weight if isinstance(module, nn.Linear) else weight.t()
