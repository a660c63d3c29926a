"""BlockLLM: tensors of large gradient norm, chosen again when the loss stalls (arXiv 2406.17296).

The unit is one parameter tensor of the decoder layers or the final norm, norms and biases included; embedding and head
are frozen. A share 1 - s of those parameters trains; every new choice drops the moments, while the learning-rate
schedule continues. Paper and code (repository RAmruthaVignesh/blockllm) are two methods:

`variant: code`: the first set is random and is sized in tensors, later ones in parameters. Score = last recorded ||g||
over exp(visits / step), with visits normalised to sum 1, so the damping by visits has no effect. Every `probe_every`
steps another random inactive tensor is probed: the norm of its gradient is recorded until the next one takes over, and
it is never updated. A new choice is possible at multiples of `update_freq`, and happens if the mean of the last
`patience` losses exceeds the mean since the last choice. The set ends before the tensor that would fill the share; if
too few tensors were ever measured, random ones fill it.

`variant: paper`: a new choice at any step whose loss exceeds the mean of the last `patience` losses. Score = norm of
the gradient as preconditioned by Adam, over the visit frequency. Our reading: a sleeping tensor has the moments of a
first step, so that g / (|g| + eps) counts its entries and the largest tensors lead until their visits hold them back.
Norms come from one more pass over the step's batches after its update (for the first set: over a calibration batch),
with each gradient freed at once, and are averaged over micro-batches; frequency = (1 + visits) / (1 + choices); a new
choice clears the loss history. The mask within a tensor, optional in the paper, is left out.

Ours in both: the recipe's AdamW, schedule and clipping (the code's own Adam has neither schedule nor weight decay); no
step is skipped (the code skips the first); norms are measured before clipping; a seeded generator of its own (the code:
the global one).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from baselines.matrices import by_layer, gradients_used_up, layer_tensors, train_only
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
)

if TYPE_CHECKING:
    from torch import Tensor, nn


class BlockLLMOptions(Options):
    """BlockLLM's block in the config."""

    variant: Literal["paper", "code"] = Field(default="code", description="see the module's docstring")
    sparsity: float = Field(default=0.9, ge=0, lt=1, description="s; 0.9 in the code, 0.5 in its example")
    update_freq: int = Field(
        default=100, gt=0, description="code: steps between two looks at the losses; 1000 there, which is most of a run"
    )
    patience: int = Field(default=100, gt=0, description="losses in the recent mean (m in the paper); 100 in the code")
    probe_every: int = Field(default=20, gt=0, description="code: steps for which one inactive tensor is probed, 20")


class BlockLLM(Method):
    """A share of the parameter tensors, chosen by gradient norm when the loss stalls."""

    Config = BlockLLMOptions
    PAPER = "arXiv 2406.17296"
    EXAMPLES = (
        {"variant": "code", "sparsity": 0.5, "update_freq": 3, "patience": 2, "probe_every": 2},
        {"variant": "paper", "sparsity": 0.7, "patience": 2},
    )
    options: BlockLLMOptions
    active: tuple[int, ...] = ()
    """Numbers of the tensors that train."""
    pending: tuple[int, ...] | None = None
    """Tensors that are chosen but not active yet; `paper` chooses at the end of a step for the next one."""
    probe: int | None = None
    choices = 0

    def skip(self, facts: ModelFacts) -> str | None:
        """Skip if the largest tensor alone fills the share: the set would be empty if it scored highest."""
        keep = self._keep(sum(facts.layer_parameters) + facts.final_norm_parameters)
        largest = max(layer_tensors(facts).values(), default=0)
        if largest >= keep:
            return (
                f"sparsity {self.options.sparsity} lets fewer than {keep:,} parameters train, and the largest tensor "
                f"has {largest:,}: lower sparsity"
            )
        return None

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze embedding and head for good; draw the first set (code)."""
        import torch

        from grass.layers import find_layers

        self.model = model.requires_grad_(False)
        found = find_layers(model)
        names = {id(p): name for name, p in model.named_parameters()}
        self.layer_of = [i for i, parameters in enumerate(found.layer_parameters()) for _ in parameters]
        self.tensors = [p for parameters in found.layer_parameters() for p in parameters] + found.outside["final_norm"]
        self.names = [names[id(p)] for p in self.tensors]
        self.keep = self._keep(sum(p.numel() for p in self.tensors))
        self.norms: dict[int, Tensor] = {}
        """Last gradient norm seen, by tensor, on the device."""
        self.scores: list[float] | None = None
        """Scores of the last choice; 0 for tensors that were never measured."""
        self.visits = [0.0] * len(self.tensors)
        """Paper: how often each tensor was chosen. Code: the same plus one, normalised to sum 1."""
        self.history: list[float] = []
        """Losses since the last choice."""
        self.loss = torch.zeros((), device=self.tensors[0].device)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.optimizer = adamw(self.tensors, self.recipe, self.lr)
        if self.options.variant == "code":
            self.visits = [1 / len(self.tensors)] * len(self.tensors)
            self.pending = self._some(range(len(self.tensors)), self._first_count())
        return model

    def prepare(self, calibration: Calibration) -> None:
        """Paper: rank all tensors on one batch."""
        if self.options.variant == "paper":
            assert self.model is not None
            model = self.model
            self._choose_by_direction(calibration.loss(model, batch) for batch in calibration.batches(1))

    def begin_step(self, step: int) -> None:
        """Probe another tensor and choose again, when due."""
        if self.options.variant == "code" and step:
            if step % self.options.probe_every == 0:
                inactive = [i for i in range(len(self.tensors)) if i not in self.active]
                self._probe(self._some(inactive, 1)[0] if inactive else None)
            if step % self.options.update_freq == 0 and self._recent_losses_are_above_all():
                self._choose_by_norm(step)
        if self.pending is not None:
            self._activate(self.pending)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add up the step's loss; once the probed gradient is complete, record its norm and free it."""
        loss.backward()
        self.loss += loss.detach()
        if last and self.probe is not None:
            self._note_norm(self.probe)
            self.tensors[self.probe].grad = None

    def end_step(self, replay: Callable[[], Iterator[Tensor]]) -> StepFacts:
        """Record norms of the active tensors, update, read the loss; then, in `paper`, choose for the next step."""
        if self.options.variant == "code":
            for i in self.active:
                self._note_norm(i)
        facts = super().end_step(replay)
        loss = host_number(self.loss)
        self.loss.zero_()
        recent = self.history[-self.options.patience :]
        self.history.append(loss)
        if self.options.variant == "paper" and len(recent) == self.options.patience and loss > fmean(recent):
            self._choose_by_direction(replay())
        return facts

    def trace(self) -> LayerTrace:
        """Tensors that train; a layer's importance is the mean of its tensors' scores at the last choice."""
        scores = self.scores
        return LayerTrace(
            active=tuple(sorted({self.layer_of[i] for i in self.active if i < len(self.layer_of)})),
            tensors=tuple(self.names[i] for i in self.active),
            importance=None if scores is None else tuple(fmean(own) for own in by_layer(scores, self.layer_of)),
        )

    def expect(self, facts: ModelFacts) -> Expectation:
        """The set may never change. The code's first set and its random filling may exceed the share."""
        sizes = sorted((p.numel() for p in self.tensors), reverse=True)
        code = self.options.variant == "code"
        return Expectation(
            layers="chosen",
            period_steps=self.options.update_freq if code else 1,
            rotates=False,
            trainable_parameters=max(sum(sizes[: self._first_count()]), self.keep + sizes[0]) if code else self.keep,
            state_bytes_per_parameter=moment_bytes(self.recipe),
            state_of="active",
        )

    def state_dict(self) -> dict[str, Any]:
        """Moments, the current set, norms, visits, losses and the generator."""
        kept = {key: getattr(self, key) for key in _KEPT}
        return {**super().state_dict(), **kept, "active": self.active, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; freezes again."""
        self._activate(tuple(state["active"]))
        for key in _KEPT:
            setattr(self, key, state[key])
        self.norms = {i: norm.to(self.loss.device) for i, norm in self.norms.items()}
        self._probe(state["probe"])
        super().load_state_dict(state)
        self.generator.set_state(state["generator"])

    # ------------------------------------------------------------ choosing

    def _keep(self, parameters: int) -> int:
        return int((1 - self.options.sparsity) * parameters)

    def _first_count(self) -> int:
        return max(1, int((1 - self.options.sparsity) * len(self.tensors)))

    def _some(self, pool: Sequence[int], count: int) -> tuple[int, ...]:
        """`count` members of `pool`, drawn uniformly without replacement."""
        from grass.sampling import draw_layers

        return tuple(pool[place] for place in draw_layers([1.0] * len(pool), count, self.generator))

    def _recent_losses_are_above_all(self) -> bool:
        patience = self.options.patience
        return len(self.history) > patience and fmean(self.history[-patience:]) > fmean(self.history)

    def _choose_by_norm(self, steps: int) -> None:
        """The code's choice, after `steps` steps."""
        norms = {i: host_number(norm) for i, norm in self.norms.items()}
        ranked = {i: norm / math.exp(self.visits[i] / steps) for i, norm in norms.items()}
        chosen, left = self._first_that_fit(ranked)
        if len(chosen) == len(ranked):
            # every measured tensor is chosen and the share is not filled: draw the rest
            others = [i for i in range(len(self.tensors)) if i not in chosen]
            while left > 0 and others:
                (drawn,) = self._some(others, 1)
                others.remove(drawn)
                chosen.append(drawn)
                left -= self.tensors[drawn].numel()
        for i in sorted(chosen):
            self.visits[i] += 1
            total = math.fsum(self.visits)
            self.visits = [visits / total for visits in self.visits]
        self._decide(chosen, ranked)

    def _choose_by_direction(self, losses: Iterable[Tensor]) -> None:
        """The paper's choice, by our reading, from the gradients of `losses`."""
        frequency = [(1 + visits) / (1 + self.choices) for visits in self.visits]
        ranked = {i: norm / frequency[i] for i, norm in enumerate(self._directions(losses))}
        chosen, _ = self._first_that_fit(ranked)
        for i in chosen:
            self.visits[i] += 1
        self._decide(chosen, ranked)

    def _first_that_fit(self, ranked: dict[int, float]) -> tuple[list[int], int]:
        """Tensors by descending score, up to the one that would fill the share; and the parameters left over."""
        chosen, left = [], self.keep
        for i in sorted(ranked, key=lambda i: (-ranked[i], i)):
            if self.tensors[i].numel() >= left:
                break
            chosen.append(i)
            left -= self.tensors[i].numel()
        return chosen, left

    def _decide(self, chosen: Sequence[int], ranked: dict[int, float]) -> None:
        self.pending = tuple(sorted(chosen))
        self.scores = [ranked.get(i, 0.0) for i in range(len(self.tensors))]
        self.choices += 1
        self.history = []

    # ------------------------------------------------------------ measuring

    def _note_norm(self, i: int) -> None:
        import torch

        gradient = self.tensors[i].grad
        if gradient is not None:
            self.norms[i] = torch.linalg.vector_norm(gradient, dtype=torch.float32)

    def _probe(self, i: int | None) -> None:
        """Let tensor `i` have gradients besides the active ones, and freeze the one probed before."""
        from grass.layers import set_trainable

        if self.probe is not None and self.probe not in self.active:
            set_trainable([self.tensors[self.probe]], False)
        self.probe = i
        if i is not None:
            set_trainable([self.tensors[i]], True)

    def _directions(self, losses: Iterable[Tensor]) -> list[float]:
        """Norm of Adam's direction of every tensor: from its moments if it trains, else that of a first step."""
        import torch

        from grass.layers import set_trainable
        from grass.probing import random_numbers_kept

        assert self.model is not None
        assert self.optimizer is not None
        (beta1, beta2), eps = self.recipe.betas, self.recipe.eps
        sums, passes = torch.zeros(len(self.tensors), device=self.loss.device), 0

        asleep = [i for i in range(len(self.tensors)) if i not in self.active]

        def reduce(number: int, gradient: Tensor) -> None:
            sums[asleep[number]] += torch.linalg.vector_norm(gradient / (gradient.abs() + eps))

        set_trainable(self.tensors, False)
        measured = gradients_used_up([self.tensors[i] for i in asleep], reduce)
        with measured, random_numbers_kept(self.loss.device):
            for loss in losses:
                loss.backward()
                passes += 1
        train_only(self.model, self.tensors, self.active)
        for i in self.active:
            state = self.optimizer.state[self.tensors[i]]
            first, second = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
            denominator = (state["exp_avg_sq"].float() / second).sqrt() + eps
            sums[i] = passes * torch.linalg.vector_norm(state["exp_avg"].float() / first / denominator)
        return [host_number(total) / passes for total in sums]

    # ------------------------------------------------------------ what trains

    def _activate(self, chosen: tuple[int, ...]) -> None:
        """Activate `chosen` and drop every moment, like the new optimizer that the code creates."""
        assert self.model is not None
        assert self.optimizer is not None
        self.optimizer.state.clear()
        self.active, self.pending, self.probe = chosen, None, None
        train_only(self.model, self.tensors, chosen)


_KEPT = ("pending", "probe", "choices", "norms", "scores", "visits", "history")
"""Attributes that the resume state stores unchanged."""
