"""BAdam: block coordinate descent with Adam (arXiv 2404.02827, NeurIPS 2024); `order: ascending` also stands for LIFT.

A block is a decoder layer. One block trains for K steps from zero moments, then the next; moments of other blocks are
not kept. In a sweep every block has one turn.

- Paper and code (Ledzy/BAdam, package `badam`): blocks, K steps each, the whole optimizer state cleared at a switch,
  an fp32 copy of the active block where weights are bf16, which is updated and rounded into them after each step;
  `random` shuffles the blocks for each sweep; embedding, final norm and head do not train unless asked for.
- The package first switches after K - 1 steps, and every K steps from then on. We follow the paper: K steps for every
  block, the first included.
- In the package the head's block holds everything that is in no other block, the final norm and, unless it has a
  block of its own, the embedding too. Here it holds head and final norm (ours).
- The package asserts that every active parameter has a gradient; here, one without is skipped. In effect, the package
  decays every parameter alike, as the recipe does here. Its trainer clips bf16 gradients; here they are clipped in fp32
  (ours).

LIFT (layer-wise fine-tuning, ICLR 2024 submission u0INlprg3U) trains one block at a time, front to back, and stops
backward there. Its interval, the handling of its state, and its code are not public: `order: ascending` with embedding
and head off is our reading of it, and must be reported as such. With bf16 weights, it also has BAdam's fp32 copy.

Backward stops at the active layer, also under activation checkpointing, unless the embedding is the active block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from baselines.matrices import copied_bytes, give_gradients, round_into_weights
from baselines.method import Expectation, LayerTrace, Method, ModelFacts, Options, StepFacts, adamw, moment_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from baselines.method import Recipe


class BadamOptions(Options):
    """BAdam's block in the config."""

    sample_every: int = Field(
        default=50,
        gt=0,
        description="K, steps a block trains; the package's 50 (the paper: 50 to 100, by data set size)",
    )
    order: Literal["random", "ascending", "descending"] = Field(
        default="random", description="of the blocks in a sweep; random is shuffled anew for each sweep"
    )
    include_embedding: bool = Field(default=False, description="the embedding is a block too, below the layers")
    include_head: bool = Field(default=False, description="head and final norm are a block too, above the layers")


class Badam(Method):
    """One block trains for K steps; then its moments are dropped and the next block starts from zero moments."""

    Config = BadamOptions
    PAPER = "arXiv 2404.02827"
    EXAMPLES: ClassVar[tuple[dict[str, Any], ...]] = (
        {"sample_every": 2},
        {"sample_every": 3, "order": "ascending"},
        {"sample_every": 2, "order": "descending", "include_embedding": True, "include_head": True},
    )
    options: BadamOptions
    optimizer: Any

    def __init__(self, options: Options, *, recipe: Recipe, lr: float, seed: int) -> None:
        super().__init__(options, recipe=recipe, lr=lr, seed=seed)
        self.block = 0
        """The block that trains."""
        self.waiting: list[int] = []
        """Blocks that have not trained yet in this sweep; in training order unless the order is random."""
        self.probability: list[float] = []
        """Probabilities of the last draw, one per block."""
        self.masters: list[nn.Parameter] = []
        """fp32 copies of the active block's parameters; empty with fp32 weights."""

    def skip(self, facts: ModelFacts) -> str | None:
        """A tied head is the embedding, and cannot be a block of its own."""
        if self.options.include_head and facts.tied_embeddings:
            return "include_head: this model's head is tied to its embedding; include_embedding trains both"
        return None

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze everything; the first step activates the first block."""
        import torch

        from grass.layers import find_layers

        self.model = model.requires_grad_(False)
        found = find_layers(model)
        self.blocks = found.layer_parameters()
        self.layers = range(len(self.blocks))
        """Indices of the blocks that are decoder layers."""
        if self.options.include_embedding:
            self.blocks.insert(0, found.outside["embedding"])
            self.layers = range(1, len(self.blocks))
        if self.options.include_head:
            self.blocks.append([*found.outside["final_norm"], *found.outside["head"]])
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.generator = torch.Generator().manual_seed(self.seed)
        self.optimizer = adamw(self.blocks[0], self.recipe, self.lr)
        return model

    def begin_step(self, step: int) -> None:
        """Activate the next block at step 0 and every K steps."""
        from grass.backward import stop_at_lowest_layer

        assert self.model is not None
        if step % self.options.sample_every == 0:
            self._activate(self._next_block())
        stop_at_lowest_layer(self.model)

    def end_step(self, replay: Callable[[], Iterator[Tensor]]) -> StepFacts:
        """Update; with bf16 weights, the update is on the fp32 copies, which are rounded into the weights."""
        # fp32 weights have no copies
        pairs = list(zip(self.blocks[self.block], self.masters, strict=True)) if self.masters else []
        give_gradients(pairs)
        facts = super().end_step(replay)
        round_into_weights(pairs)
        return facts

    def trace(self) -> LayerTrace:
        """The active layer, or the tensors of the active block, and the probabilities of the draw that chose it."""
        chosen = tuple(self.names[id(p)] for p in self.blocks[self.block])
        return LayerTrace(
            active=(self.layers.index(self.block),) if self.block in self.layers else (),
            tensors=chosen if self._has_other_blocks else None,
            probability=tuple(self.probability[block] for block in self.layers),
        )

    def expect(self, facts: ModelFacts) -> Expectation:
        """In every period one block moves, and only that block has state."""
        return Expectation(
            layers="chosen" if self._has_other_blocks else "sampled",
            active_layers=None if self._has_other_blocks else 1,
            period_steps=self.options.sample_every,
            trainable_parameters=max(sum(p.numel() for p in block) for block in self.blocks),
            state_bytes_per_parameter=moment_bytes(self.recipe) + copied_bytes(self.recipe),
            state_of="active",
        )

    def state_dict(self) -> dict[str, Any]:
        """Moments and fp32 copies of the active block, the sweep so far and the generator."""
        own = {"block": self.block, "waiting": self.waiting, "probability": self.probability}
        copies = [master.detach() for master in self.masters]
        return {**super().state_dict(), **own, "masters": copies, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; activates the block again."""
        import torch

        self._activate(state["block"])
        super().load_state_dict(state)
        with torch.no_grad():
            for master, saved in zip(self.masters, state["masters"], strict=True):
                master.copy_(saved)
        self.waiting, self.probability = list(state["waiting"]), list(state["probability"])
        self.generator.set_state(state["generator"])

    @property
    def _has_other_blocks(self) -> bool:
        return self.options.include_embedding or self.options.include_head

    def _next_block(self) -> int:
        """At random without replacement, or in order, which is a draw from one candidate."""
        from grass.sampling import draw_layers

        if not self.waiting:
            self.waiting = list(range(len(self.blocks)))
            if self.options.order == "descending":
                self.waiting.reverse()
        candidates = self.waiting if self.options.order == "random" else self.waiting[:1]
        self.probability = [(b in candidates) / len(candidates) for b in range(len(self.blocks))]
        (block,) = draw_layers(self.probability, 1, self.generator)
        # a memory forecast chooses the block itself, possibly one that has already trained in this sweep
        self.waiting = [other for other in self.waiting if other != block]
        return block

    def _activate(self, block: int) -> None:
        """From now on only `block` trains; all optimizer state is cleared (in the code: for every parameter)."""
        from torch import float32, nn

        from grass.layers import set_trainable

        for number, parameters in enumerate(self.blocks):
            set_trainable(parameters, number == block)
        self.block = block
        self.optimizer.state.clear()
        group = self.optimizer.param_groups[0]
        # free the old copies before the new ones are allocated
        self.masters, group["params"] = [], self.blocks[block]
        if self.recipe.weight_dtype == "bf16":
            self.masters = group["params"] = [nn.Parameter(p.detach().to(float32)) for p in self.blocks[block]]
