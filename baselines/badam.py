"""BAdam: block coordinate descent with Adam (arXiv 2404.02827, NeurIPS 2024); `order: ascending` also stands for LIFT.

A block is a decoder layer. One block trains for K steps, from zero moments, then the next; the moments of all others
are gone. In a sweep every block has one turn.

- Paper and code (Ledzy/BAdam, package `badam`): blocks, K steps each, the whole optimizer state cleared at a switch,
  an fp32 copy of the active block where weights are bf16, which is updated and rounded into them after each step;
  `random` shuffles the blocks for each sweep; embedding, final norm and head do not train unless asked for.
- The package switches for the first time after K - 1 steps, and counts K from there. We follow the paper: K steps from
  the first block on.
- In the package the head's block holds everything that is in no other block, the final norm and, unless it has a
  block of its own, the embedding too. Here it holds head and final norm (ours).
- The package asserts that every active parameter has a gradient; here one without is left alone. It decays every
  parameter alike, in effect, as the recipe does here. It is clipped by its trainer on bf16 gradients; here they are
  clipped in fp32 (ours).

LIFT (layer-wise fine-tuning, ICLR 2024 submission u0INlprg3U) trains one block at a time, front to back, and stops
backward there. Its interval, what becomes of its state, and its code are not public: `order: ascending` with embedding
and head off is our reading of it, and is to be named so. With bf16 weights BAdam's fp32 copy comes on top of that.

Backward stops at the active layer, under activation checkpointing too, unless the embedding has its turn.
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
    """One block trains for K steps; then its moments are dropped and the next one's begin at zero."""

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
        """Blocks without a turn in this sweep; in turn, where the order is no matter of chance."""
        self.probability: list[float] = []
        """Of the last draw, one a block."""
        self.masters: list[nn.Parameter] = []
        """fp32 copies of the active block's parameters; none with fp32 weights."""

    def skip(self, facts: ModelFacts) -> str | None:
        """A tied head is the embedding, and cannot be a block of its own."""
        if self.options.include_head and facts.tied_embeddings:
            return "include_head: this model's head is tied to its embedding; include_embedding trains both"
        return None

    def attach(self, model: nn.Module) -> nn.Module:
        """Freeze everything; the first step wakes the first block."""
        import torch

        from grass.layers import find_layers

        self.model = model.requires_grad_(False)
        found = find_layers(model)
        self.blocks = found.layer_parameters()
        self.layers = range(len(self.blocks))
        """Which blocks are the decoder layers."""
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
        """The next block at step 0 and every K steps."""
        from grass.backward import stop_at_lowest_layer

        assert self.model is not None
        if step % self.options.sample_every == 0:
            self._activate(self._next_block())
        stop_at_lowest_layer(self.model)

    def end_step(self, replay: Callable[[], Iterator[Tensor]]) -> StepFacts:
        """With bf16 weights: their gradients go to the fp32 copies, which are updated and rounded into them."""
        # no copies with fp32 weights
        pairs = list(zip(self.blocks[self.block], self.masters, strict=True)) if self.masters else []
        give_gradients(pairs)
        facts = super().end_step(replay)
        round_into_weights(pairs)
        return facts

    def trace(self) -> LayerTrace:
        """The active layer, or the tensors of the active block; the chances of the draw that chose it."""
        chosen = tuple(self.names[id(p)] for p in self.blocks[self.block])
        return LayerTrace(
            active=(self.layers.index(self.block),) if self.block in self.layers else (),
            tensors=chosen if self._has_other_blocks else None,
            probability=tuple(self.probability[block] for block in self.layers),
        )

    def expect(self, facts: ModelFacts) -> Expectation:
        """One block moves in every period and has state; nothing else has."""
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
        """Inverse of `state_dict`; wakes the block again."""
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
        """Without replacement by chance, or in turn; a draw with one candidate leaves nothing to chance."""
        from grass.sampling import draw_layers

        if not self.waiting:
            self.waiting = list(range(len(self.blocks)))
            if self.options.order == "descending":
                self.waiting.reverse()
        candidates = self.waiting if self.options.order == "random" else self.waiting[:1]
        self.probability = [(b in candidates) / len(candidates) for b in range(len(self.blocks))]
        (block,) = draw_layers(self.probability, 1, self.generator)
        # a forecast of memory says itself which block comes, be it one that had its turn
        self.waiting = [other for other in self.waiting if other != block]
        return block

    def _activate(self, block: int) -> None:
        """Only `block` trains from here on; whatever state there was is cleared (the code: for every parameter)."""
        from torch import float32, nn

        from grass.layers import set_trainable

        for number, parameters in enumerate(self.blocks):
            set_trainable(parameters, number == block)
        self.block = block
        self.optimizer.state.clear()
        group = self.optimizer.param_groups[0]
        # the old copies go before the new ones come
        self.masters, group["params"] = [], self.blocks[block]
        if self.recipe.weight_dtype == "bf16":
            self.masters = group["params"] = [nn.Parameter(p.detach().to(float32)) for p in self.blocks[block]]
