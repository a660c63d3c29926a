"""When the state offload acts during forward and backward: hooks on the decoder layers and on their gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grass.host import current
from grass.offload.blocks import Block
from grass.offload.offload import StateOffload


class LayerHooks:
    """Frees written-back buffers during forward; fetches states of layers with final gradients during backward.

    Args:
        states: the state offload that these hooks drive.
        layers: decoder layers, bottom first.
        blocks: by number of a layer that can be drawn, its block.
        outside: blocks of the trained parameters outside the layers.
        below: whether backward continues below the lowest active layer (the embedding trains).
    """

    def __init__(
        self,
        states: StateOffload,
        layers: Sequence[nn.Module],
        blocks: Mapping[int, Block],
        *,
        outside: Sequence[Block],
        below: bool,
    ) -> None:
        self._states = states
        self._blocks = dict(blocks)
        self._outside = list(outside)
        self._below = below
        self._active: list[int] = []
        self._trained: list[nn.Parameter] = []
        self._accumulation_steps = 1
        self._fired: dict[int, int] = {}
        """Gradients stored since the last step, by layer."""
        self._final: list[Block] = []
        """Active layers whose gradients are final, in the order of completion."""
        self._stored_before = 0
        """Bytes of gradients that existed as backward entered its current layer."""
        self._to_return = 0
        self._gradient_handles: list[torch.utils.hooks.RemovableHandle] = []
        count = len(layers)
        self._handles = [
            layer.register_forward_pre_hook(self._before_layer(number, count)) for number, layer in enumerate(layers)
        ]
        # without an allocator count there is no headroom, and nothing to measure
        self._watches = current().allocated_bytes(states.device) is not None
        if self._watches:
            after_layer = _ModuleHook(self._after_layer)
            self._handles += [layer.register_forward_hook(after_layer) for layer in layers]

    def change(self, active: Sequence[int], accumulation_steps: int) -> None:
        """From now on the layers `active` train, with `accumulation_steps` backward passes a step."""
        self._active = list(active)
        awake = [*self._outside, *(self._blocks[layer] for layer in self._active)]
        self._trained = [p for block in awake for p in block.parameters]
        for handle in self._gradient_handles:
            handle.remove()
        self._gradient_handles = []
        if self._watches and self._states.mode == "move":
            for layer in self._active:
                hook = self._gradient_ready(layer)
                self._gradient_handles += [
                    p.register_post_accumulate_grad_hook(hook) for p in self._blocks[layer].parameters
                ]
        self._count_anew(accumulation_steps)

    def last_micro_batch(self) -> None:
        """The next backward pass is the step's last."""
        self._count_anew(1)

    def step_done(self, accumulation_steps: int) -> None:
        """The update is over; reset the counts."""
        self._states.headroom.step_done()
        self._count_anew(accumulation_steps)

    def _count_anew(self, accumulation_steps: int) -> None:
        self._fired, self._final, self._accumulation_steps = {}, [], accumulation_steps
        self._to_return = self._states.returning

    def remove(self) -> None:
        """Remove every hook; hooks that a live autograd graph still holds no longer do anything."""
        for handle in [*self._handles, *self._gradient_handles]:
            handle.remove()
        self._final = []

    def _before_layer(self, number: int, count: int) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, arguments: Any) -> None:
            if torch._C._current_graph_task_id() != -1:
                return  # within backward: recomputation under checkpointing
            # a forward pass without a step since the last backward: fetched buffers would add to its activations
            self._final = []
            self._states.drop_fetched()
            # activations grow layer by layer and buffers are freed at the same pace, so their peaks do not add up
            if self._states.returning:
                self._states.release(keep=self._to_return * (count - 1 - number) // count)

        return _ModuleHook(hook)

    def _after_layer(self, module: nn.Module, arguments: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if self._gradient_handles and torch.is_grad_enabled() and isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(self._entering_layer)

    def _entering_layer(self, gradient: Tensor) -> None:
        self._states.headroom.entering_layer()
        self._stored_before = self._stored()
        self._fetch()

    def _gradient_ready(self, layer: int) -> Callable[[Tensor], None]:
        block = self._blocks[layer]

        def hook(parameter: Tensor) -> None:
            self._states.headroom.gradient_ready(stored=self._stored() - self._stored_before)
            self._fired[layer] = self._fired.get(layer, 0) + 1
            # modulo, because the counts of an abandoned step are not reset
            if self._fired[layer] % (len(block.parameters) * self._accumulation_steps) == 0:
                self._final.append(block)
                self._fetch()

        return hook

    def _stored(self) -> int:
        return sum(p.grad.nbytes for p in self._trained if p.grad is not None)

    def _fetch(self) -> None:
        if self._final:
            gradients = sum(p.nbytes for p in self._trained) - self._stored_before
            more_to_come = self._below or len(self._final) < len(self._active)
            self._states.prefetch(self._final, more_to_come=more_to_come, gradients=gradients)


class _ModuleHook:
    """A module's hook that is not compiled: a compiled layer would compile its hooks too and run parts of them twice.

    A pickled or copied model gets one that does nothing, since it is not the model of this optimizer.
    """

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = torch.compiler.disable(call)

    def __call__(self, *arguments: Any) -> None:
        self._call(*arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return _ModuleHook, (_nothing,)


def _nothing(*arguments: Any) -> None:
    pass
