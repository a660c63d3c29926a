"""AdaGradSelect: blocks by gradient norm at first, then by a Dirichlet over update counts (arXiv 2512.15764).

The authors published no code, so all of this is our reading of the paper. Blocks are the decoder layers, the embedding,
the final norm and an untied head. In each step of the first epoch, with probability eps_0 exp(-lambda t), the k % of
blocks with the largest accumulated gradient norm train (explore). Otherwise, and in all later epochs, p is drawn from
Dirichlet(f + delta), where f are past update counts, and the k % with the largest p train (exploit). Moments are kept
on the host in page-locked blocks, are copied to the device for the update and back after it, and are never dropped.

Ours, since the paper leaves it open: eps_0, lambda, delta and the end of the first epoch (`explore_steps`); k % of the
blocks is rounded, with at least one block; the accumulated norm is the sum over steps of the norm of a block's whole
gradient, whatever its size. Which norms are summed decides what exploring means. We take the cheapest choice that
treats all blocks alike: an exploring step chooses by the norms of *earlier* exploring steps and of one calibration
batch before training. In its backward pass, every block's gradient is reduced to its norm, and gradients of blocks that
do not train are freed as they appear. So an exploring step costs a backward pass through all layers and one tensor's
gradient more than any other step, never all gradients. Exploiting steps measure nothing: they could add norms only to
trained blocks, and exploring would then keep choosing these. With gradient accumulation, a step's norm is the root of
the micro-batches' summed squares. Copies to and from the host do not overlap with other work, so memory matches the
paper but speed does not. AdamW, schedule and clipping are the recipe's.

A Dirichlet over growing counts concentrates, so the set hardly changes later; `later: most_chosen` is the control that
fixes it after the first epoch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

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
    import torch
    from torch import Tensor, nn


class AdaGradSelectOptions(Options):
    """AdaGradSelect's block in the config; defaults are ours but for `blocks_share`."""

    blocks_share: float = Field(default=0.1, gt=0, le=1, description="k %; the paper's headline has 10 % of blocks")
    explore_steps: int | None = Field(
        default=None, ge=0, description="steps of the first epoch; null: a third of the run, as in three epochs"
    )
    epsilon: float = Field(default=1.0, ge=0, le=1, description="eps_0, chance of exploring in the first step")
    decay: float = Field(default=0.01, ge=0, description="lambda, of that chance, per step")
    delta: float = Field(default=1.0, gt=0, description="added to every count")
    later: Literal["dirichlet", "most_chosen"] = Field(
        default="dirichlet",
        description="after the first epoch; most_chosen keeps the blocks of largest count: a control",
    )


class AdaGradSelect(Method):
    """Trains a few blocks at a time, chosen again in every step."""

    Config = AdaGradSelectOptions
    PAPER = "arXiv 2512.15764"
    EXAMPLES = (
        {"blocks_share": 0.3, "explore_steps": 6, "decay": 0.2},
        {"blocks_share": 0.5, "explore_steps": 4, "epsilon": 0.5, "later": "most_chosen"},
    )
    options: AdaGradSelectOptions
    active: tuple[int, ...] = ()
    """Numbers of the blocks that train in this step."""
    exploring = False

    def attach(self, model: nn.Module) -> nn.Module:
        """Make one block per decoder layer, and one per parameter group outside the layers."""
        import torch

        from grass.host import current
        from grass.layers import find_layers

        self.model = model
        found = find_layers(model)
        self.names = {id(p): name for name, p in model.named_parameters()}
        outside = [found.outside[key] for key in ("embedding", "final_norm", "head") if found.outside[key]]
        self.layers = len(found.layers)
        self.blocks = [*found.layer_parameters(), *outside]
        """Parameters of each block, the layers first, bottom up."""
        self.count = max(1, round(self.options.blocks_share * len(self.blocks)))
        self.counts = [0] * len(self.blocks)
        """f, the number of steps in which each block trained."""
        self.accumulated = [0.0] * len(self.blocks)
        """Summed norms of the exploring steps and the calibration batch."""
        self.squares = torch.zeros(len(self.blocks), device=self.blocks[0][0].device)
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        self.generator = torch.Generator().manual_seed(self.seed)
        self.gamma = random.Random(self.seed)
        """Generator for the Dirichlet: no public torch function draws gamma variables from a torch generator."""
        self.optimizer = adamw(list(model.parameters()), self.recipe, self.lr)
        on_gpu = self.squares.device.type == "cuda"
        # copies are synchronous, so none is in flight when a block is released
        self.arena = current().arena(pin=on_gpu, settle=lambda: None)
        self.hosts: dict[nn.Parameter, Tensor] = {}
        """Host block of both moments of every tensor that has trained, shape (2, entries)."""
        return model

    def prepare(self, calibration: Calibration) -> None:
        """Measure the norms of all blocks on one batch, for the first choice; no gradient is left."""
        assert self.model is not None
        self._measure_all()
        for batch in calibration.batches(1):
            calibration.loss(self.model, batch).backward()
        self._add_measured()

    def begin_step(self, step: int) -> None:
        """Choose blocks by earlier steps' norms or the counts; enable gradients and, if exploring, measure them."""
        from grass.sampling import draw_layers

        explore_steps = self.options.explore_steps
        first_epoch = step < (self.recipe.steps // 3 if explore_steps is None else explore_steps)
        chance = self.options.epsilon * math.exp(-self.options.decay * step) if first_epoch else 0.0
        self.exploring = chance > 0 and draw_layers([chance, 1 - chance], 1, self.generator) == (0,)
        if self.exploring:
            self.active = self._largest(self.accumulated)
        elif first_epoch or self.options.later == "dirichlet":
            self.active = self._largest(self._dirichlet())
        else:
            self.active = self._largest(self.counts)
        self._freeze()
        if self.exploring:
            self._measure_all()

    def end_step(self, replay: Callable[[], Iterator[Tensor]]) -> StepFacts:
        """Update the active blocks; their moments are on the device only during the update."""
        if self.exploring:
            self._add_measured()
        training = [p for block in self.active for p in self.blocks[block]]
        self._move_moments(training, to_host=False)
        facts = super().end_step(replay)
        self._move_moments(training, to_host=True)
        for block in self.active:
            self.counts[block] += 1
        return facts

    def trace(self) -> LayerTrace:
        """Importance: accumulated norms. Probability: the Dirichlet's mean, among the layers."""
        total = math.fsum(count + self.options.delta for count in self.counts[: self.layers])
        return LayerTrace(
            active=tuple(block for block in self.active if block < self.layers),
            tensors=tuple(self.names[id(p)] for block in self.active for p in self.blocks[block]),
            importance=tuple(self.accumulated[: self.layers]),
            probability=tuple((count + self.options.delta) / total for count in self.counts[: self.layers]),
        )

    def pinned_bytes(self) -> int:
        """Host blocks of moments that are registered with CUDA."""
        return self.arena.pinned_bytes

    def sleeps_on_host(self) -> bool:
        """Always."""
        return True

    def expect(self, facts: ModelFacts) -> Expectation:
        """At most the largest blocks train; as counts grow, the choice may stop changing."""
        sizes = sorted((sum(p.numel() for p in block) for block in self.blocks), reverse=True)
        return Expectation(
            layers="chosen",
            period_steps=1,
            rotates=False,
            trainable_parameters=sum(sizes[: self.count]),
            state_bytes_per_parameter=moment_bytes(self.recipe),
            state_of="visited",
        )

    def state_dict(self) -> dict[str, Any]:
        """Moments, counts, norms and the generator."""
        own = {"counts": self.counts, "accumulated": self.accumulated, "generator": self.generator.get_state()}
        own["gamma"] = self.gamma.getstate()
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; moments go back to the host."""
        super().load_state_dict(state)
        self._move_moments([p for block in self.blocks for p in block], to_host=True)
        self.counts, self.accumulated = list(state["counts"]), list(state["accumulated"])
        self.generator.set_state(state["generator"])
        self.gamma.setstate(state["gamma"])

    def _largest(self, values: Sequence[float]) -> tuple[int, ...]:
        return tuple(sorted(sorted(range(len(values)), key=lambda block: (-values[block], block))[: self.count]))

    def _dirichlet(self) -> list[float]:
        """One draw of p as independent gamma variables; dividing by their sum is left out, as it keeps the order."""
        return [self.gamma.gammavariate(count + self.options.delta, 1.0) for count in self.counts]

    def _freeze(self) -> None:
        from grass.backward import stop_at_lowest_layer
        from grass.layers import set_trainable

        assert self.model is not None
        for block, parameters in enumerate(self.blocks):
            set_trainable(parameters, block in self.active)
        stop_at_lowest_layer(self.model)

    def _measure_all(self) -> None:
        """Let every block have gradients; those of blocks that do not train are freed once measured."""
        import torch

        from grass.layers import set_trainable

        def read(block: int) -> Callable[[Tensor], None]:
            # runs before the gradient is added to that of earlier micro-batches
            def hook(gradient: Tensor) -> None:
                self.squares[block] += torch.linalg.vector_norm(gradient, dtype=torch.float32).square()

            return hook

        def free(parameter: Tensor) -> None:
            parameter.grad = None

        for block, parameters in enumerate(self.blocks):
            set_trainable(parameters, True)
            self.handles += [p.register_hook(read(block)) for p in parameters]
            if block not in self.active:
                self.handles += [p.register_post_accumulate_grad_hook(free) for p in parameters]

    def _add_measured(self) -> None:
        from grass.layers import set_trainable

        for handle in self.handles:
            handle.remove()
        self.handles = []
        for block, parameters in enumerate(self.blocks):
            self.accumulated[block] += host_number(self.squares[block]) ** 0.5
            if block not in self.active:
                set_trainable(parameters, False)
        self.squares.zero_()

    def _move_moments(self, parameters: Sequence[nn.Parameter], *, to_host: bool) -> None:
        """Copy both moments of `parameters` to their host block, which is allocated at first use, or from it."""
        assert self.optimizer is not None
        for parameter in parameters:
            if parameter not in self.optimizer.state:
                continue
            state = self.optimizer.state[parameter]
            if to_host and parameter not in self.hosts:
                self.hosts[parameter] = self.arena.take(parameter.numel(), state["exp_avg"].dtype)
            for part, key in enumerate(("exp_avg", "exp_avg_sq")):
                host = self.hosts[parameter][part].view(parameter.shape)
                if to_host:
                    host.copy_(state[key])
                state[key] = host if to_host else host.to(parameter.device, copy=True)
