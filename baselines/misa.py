"""MISA: module-wise importance sampling (arXiv 2511.00056, NeurIPS 2025; repository pkumelon/MISA).

A module is one weight matrix of a decoder layer; norms, biases, embedding and head are frozen. A few modules, at most a
share delta of all parameters, train at a time. Paper and code are two methods:

`variant: paper`: G_b <- beta G_b + (1 - beta) * mean over the T inner steps of ||g_b||^2, scaled by parameter count;
p_b proportional to exp(eta G_b), uniform at first (Algorithm 1); Adam with a max-type second moment; one more momentum
step of size beta1 / (1 - beta1) after the T steps; state cleared. Our reading: "scaled" means divided by the module's
own count; norms are measured before clipping, which the algorithm lacks; modules are drawn one by one without
replacement, and the first that would exceed delta ends the draw; the max-type moment is AMSGrad's; the extra step
repeats the last step's bias-corrected direction at its learning rate, without weight decay; a period cut short by the
end of the run has no extra step.

`variant: code`: G averages the norm, measured after clipping; its bias correction is written back, so it compounds; p_b
is proportional to exp(min(cap, eta G^2)). The `sample_last` longest-unused modules are chosen first, then modules are
drawn until none fits. Until every module was drawn once, the set changes at every step, bottom up, and these norms are
divided by T although only one step was made. State is cleared unless a module is drawn again at once. Our reading: in
the first cycle, every module that fits and was not drawn yet is chosen, in the model's order; the longest-unused
modules are those of the earliest draw, lower ones first; a module drawn again at once keeps its fp32 copy too.

Ours in both: modules larger than delta are never drawn; draws use their own seeded generator (the code: the global
one); the recipe's AdamW; bf16 weights have an fp32 copy while they train; no cache is emptied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from baselines.matrices import (
    by_layer,
    copied_bytes,
    give_gradients,
    layer_tensors,
    round_into_weights,
    train_only,
    trained_copy,
)
from baselines.method import (
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

MATRIX_WIDTHS = 8
"""If only sizes are known, a layer's tensor counts as a matrix if it has at least this many times the model's width
entries: norms and biases are smaller."""


class MisaOptions(Options):
    """MISA's block in the config."""

    variant: Literal["paper", "code"] = Field(default="code", description="see the module's docstring")
    share: float = Field(
        default=0.03, gt=0, le=1, description="delta, share of all parameters that may train; 0.03 in paper and code"
    )
    period: int = Field(default=50, gt=0, description="T, steps between two draws; 50 in the code")
    beta: float = Field(default=0.8, ge=0, lt=1, description="weight of the old score; 0.8 in the code")
    eta: float = Field(
        default=1.0,
        ge=0,
        description="1 for fine-tuning in the code, 500 for its pre-training; variant paper needs far more, by our "
        "reading of its scale: its scores are mean squares of gradient entries, below 1e-4, so 1 draws uniformly",
    )
    cap: float = Field(default=5.0, gt=0, description="code: largest exponent, 5 there")
    sample_last: int = Field(default=2, ge=0, description="code: longest-unused modules that enter, 2 in its readme")


class Misa(Method):
    """Trains a share of the weight matrices at a time, drawn by the softmax of their gradient norms."""

    Config = MisaOptions
    PAPER = "arXiv 2511.00056"
    EXAMPLES = (
        {"variant": "code", "share": 0.12, "period": 3},
        {"variant": "paper", "share": 0.12, "period": 3},
        {"variant": "paper", "share": 0.2, "period": 4, "eta": 500.0},
    )
    options: MisaOptions
    active: tuple[int, ...] = ()
    """Numbers of the modules that train."""
    step = 0
    next_draw = 0
    """Step at which modules are drawn next."""
    draws = 0

    def skip(self, facts: ModelFacts) -> str | None:
        """Skip a share below the smallest matrix, which trains nothing, and AMSGrad with moments other than fp32."""
        if self.options.variant == "paper" and self.recipe.state_dtype != "fp32":
            return "variant paper keeps its max-type moments in fp32: set state_dtype fp32, or variant code"
        sizes = layer_tensors(facts).values()
        smallest = min((n for n in sizes if n >= MATRIX_WIDTHS * facts.hidden_size), default=0)
        if self._budget(facts.total_parameters) < smallest:
            return (
                f"share {self.options.share} of {facts.total_parameters:,} parameters is below the smallest weight "
                f"matrix, {smallest:,}: set share to {_round_up(smallest / facts.total_parameters)} or more"
            )
        return None

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze everything; the optimizer's parameters are those of the current draw."""
        import torch

        from grass.layers import find_layers

        self.model = model.requires_grad_(False)
        names = {id(p): name for name, p in model.named_parameters()}
        stack = find_layers(model).layer_parameters()
        matrices = [(layer, p) for layer, parameters in enumerate(stack) for p in parameters if p.dim() > 1]
        self.layer_of = [layer for layer, _ in matrices]
        self.weights = [p for _, p in matrices]
        self.names = [names[id(p)] for p in self.weights]
        self.budget = self._budget(sum(p.numel() for p in model.parameters()))
        self.candidates = [i for i, p in enumerate(self.weights) if p.numel() <= self.budget]
        if not self.candidates:
            raise ValueError(f"share {self.options.share} admits no weight matrix of this model: raise it")
        self.scores = [0.0] * len(matrices)
        """G, one score per module."""
        self.visits = [0] * len(matrices)
        self.last_draw = [0] * len(matrices)
        """Number of the last draw that included each module."""
        self.sums = torch.zeros(len(matrices), device=self.weights[0].device)
        """Summed norms (paper: squared and scaled) since the last draw."""
        self.held: dict[int, Tensor] = {}
        """Tensors that the optimizer updates, by active module: the weight, or its fp32 copy if weights are bf16."""
        self.generator = torch.Generator().manual_seed(self.seed)
        if self.options.variant == "code":
            self.optimizer = adamw(self.weights, self.recipe, self.lr)
        else:
            self.optimizer = torch.optim.AdamW(
                self.weights,
                lr=self.lr,
                betas=self.recipe.betas,
                eps=self.recipe.eps,
                weight_decay=self.recipe.weight_decay,
                amsgrad=True,
                foreach=False,
            )
        return model

    def begin_step(self, step: int) -> None:
        """At the end of a period, score the modules that trained, then draw again."""
        self.step = step
        if step == self.next_draw:
            self._score()
            fresh = [i for i in self.candidates if not self.visits[i]] if self.options.variant == "code" else []
            self.draws += 1
            self.next_draw += 1 if fresh else self.options.period
            self._activate(self._first_that_fit(fresh) if fresh else self._draw())

    def end_step(self, replay: Callable[[], Iterator[Tensor]]) -> StepFacts:
        """Measure norms, clip and update; bf16 weights are rounded from their fp32 copies."""
        import torch

        pairs = [(self.weights[i], held) for i, held in self.held.items()]
        give_gradients(pairs)
        norms = {i: torch.linalg.vector_norm(self.held[i].grad) for i in self.active}  # type: ignore[arg-type]
        facts = super().end_step(replay)
        for i, norm in norms.items():
            self.sums[i] += self._measured(i, norm, facts)
        if self.options.variant == "paper" and self.step + 1 == self.next_draw:
            self._momentum_step()
        round_into_weights(pairs)
        return facts

    def probabilities(self) -> list[float]:
        """Probability of each module in the next single draw, summing to 1; modules larger than the share have 0."""
        exponents = [self._exponent(score) for score in self.scores]
        largest = max(exponents[i] for i in self.candidates)
        powers = [math.exp(e - largest) if i in self.candidates else 0.0 for i, e in enumerate(exponents)]
        total = math.fsum(powers)
        return [power / total for power in powers]

    def trace(self) -> LayerTrace:
        """Modules that train; per layer, the mean of its modules' scores and the sum of their probabilities."""
        return LayerTrace(
            active=tuple(sorted({self.layer_of[i] for i in self.active})),
            tensors=tuple(self.names[i] for i in self.active),
            importance=tuple(fmean(own) for own in by_layer(self.scores, self.layer_of)),
            probability=tuple(math.fsum(own) for own in by_layer(self.probabilities(), self.layer_of)),
        )

    def expect(self, facts: ModelFacts) -> Expectation:
        """At most the share trains. The code's first cycle changes the set at every step, so every step is a period."""
        moments = moment_bytes(self.recipe) if self.options.variant == "code" else 12
        return Expectation(
            layers="chosen",
            period_steps=1 if self.options.variant == "code" else self.options.period,
            trainable_parameters=self._budget(facts.total_parameters),
            state_bytes_per_parameter=moments + copied_bytes(self.recipe),
            state_of="active",
        )

    def state_dict(self) -> dict[str, Any]:
        """Moments, fp32 copies, scores, the current draw and the generator."""
        kept = {key: getattr(self, key) for key in _KEPT}
        copies = {i: held for i, held in self.held.items() if held is not self.weights[i]}
        return {**super().state_dict(), **kept, "copies": copies, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; freezes again."""
        self._activate(tuple(state["active"]))
        for key in _KEPT:
            setattr(self, key, state[key])
        self.sums = self.sums.to(self.weights[0].device)
        for i, copy in state["copies"].items():
            self.held[i].copy_(copy)
        super().load_state_dict(state)
        self.generator.set_state(state["generator"])

    # ------------------------------------------------------------ scores

    def _measured(self, i: int, norm: Tensor, facts: StepFacts) -> Tensor:
        """Term that one step adds to a module's sum, from its norm before clipping."""
        if self.options.variant == "paper":
            return norm.square() / self.weights[i].numel()
        limit = self.recipe.max_grad_norm
        assert facts.grad_norm is not None
        # the factor that torch's clipping uses
        return norm if limit is None else norm * min(1.0, limit / (facts.grad_norm + 1e-6))

    def _score(self) -> None:
        """Update G of the modules that trained from their sums; the code divides by T in its first cycle too."""
        beta = self.options.beta
        for i in self.active:
            self.visits[i] += 1
            self.last_draw[i] = self.draws
            self.scores[i] = beta * self.scores[i] + (1 - beta) * host_number(self.sums[i]) / self.options.period
            if self.options.variant == "code":
                # written back, so the next visit corrects it again
                self.scores[i] /= 1 - beta ** self.visits[i]
        self.sums.zero_()

    def _exponent(self, score: float) -> float:
        eta = self.options.eta
        return eta * score if self.options.variant == "paper" else min(self.options.cap, eta * score * score)

    # ------------------------------------------------------------ draws

    def _budget(self, total_parameters: int) -> int:
        return int(self.options.share * total_parameters)

    def _fits(self, chosen: Sequence[int], i: int) -> bool:
        return sum(self.weights[j].numel() for j in (*chosen, i)) <= self.budget

    def _first_that_fit(self, modules: Sequence[int]) -> tuple[int, ...]:
        chosen: list[int] = []
        for i in modules:
            if self._fits(chosen, i):
                chosen.append(i)
        return tuple(chosen)

    def _draw(self) -> tuple[int, ...]:
        """Draw modules one by one by p, renormalised over the rest; the longest-unused ones come first (code)."""
        from grass.sampling import draw_layers

        code, probability = self.options.variant == "code", self.probabilities()
        longest_unused = sorted(self.candidates, key=lambda i: (self.last_draw[i], i))
        chosen = list(self._first_that_fit(longest_unused[: self.options.sample_last] if code else []))
        while True:
            rest = [i for i in self.candidates if i not in chosen and (self._fits(chosen, i) or not code)]
            if not rest:
                break
            (place,) = draw_layers([probability[i] for i in rest], 1, self.generator)
            if not self._fits(chosen, rest[place]):
                break
            chosen.append(rest[place])
        return tuple(sorted(chosen))

    # ------------------------------------------------------------ what the optimizer holds

    def _activate(self, chosen: tuple[int, ...]) -> None:
        """Free the state of modules that leave (paper: of all), add those that enter, set `requires_grad`."""
        assert self.optimizer is not None
        assert self.model is not None
        for i in self.active:
            if self.options.variant == "paper" or i not in chosen:
                self.optimizer.state.pop(self.held.pop(i), None)
        train_only(self.model, self.weights, chosen)
        for i in chosen:
            if i not in self.held:
                self.held[i] = trained_copy(self.weights[i], self.recipe)
        self.optimizer.param_groups[0]["params"] = [self.held[i] for i in chosen]
        self.active = chosen

    def _momentum_step(self) -> None:
        """The paper's extra step of size beta1 / (1 - beta1) along the last direction."""
        import torch

        assert self.optimizer is not None
        group, (beta1, beta2) = self.optimizer.param_groups[0], self.recipe.betas
        first, second = 1 - beta1**self.options.period, 1 - beta2**self.options.period
        with torch.no_grad():
            for held in group["params"]:
                state = self.optimizer.state[held]
                denominator = (state["max_exp_avg_sq"] / second).sqrt_().add_(self.recipe.eps)
                size = group["lr"] * beta1 / (1 - beta1) / first
                held.addcdiv_(state["exp_avg"], denominator, value=-size)


_KEPT = ("active", "next_draw", "draws", "scores", "visits", "last_draw", "sums")
"""Attributes that the resume state stores unchanged."""


def _round_up(share: float) -> float:
    """Round up to three significant digits."""
    unit = 10.0 ** (math.floor(math.log10(share)) - 2)
    return round(math.ceil(share / unit) * unit, 12)
