"""AdamW over the groups that train, with moments wherever the state offload keeps them.

The optimizer's `state` exposes each parameter's moments as views of its group's block, together with the parameter's
own step count: layers that trained at different times have different bias corrections.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from grass.adamw import Entries, Rounding, flat, update_pieces
from grass.offload.blocks import Block, Chunk
from grass.offload.hooks import LayerHooks
from grass.offload.offload import StateOffload
from grass.options import Options
from grass.quantised import PACKED, stored_dtype


class LayerStates:
    """Moments and step counts of one `Grass`, and the update that uses them.

    Args:
        optimizer: its `state` and `param_groups` are used; there is one block a group, in the same order.
        layers: decoder layers, bottom first.
        layer_groups: by number of a layer that can be drawn, the index of its group.
        options: the run's options.
    """

    def __init__(
        self, optimizer: Optimizer, layers: Sequence[nn.Module], layer_groups: Mapping[int, int], options: Options
    ) -> None:
        self._optimizer = optimizer
        self._layers = layers
        self._options = options
        self._rounding = Rounding(options.seed) if options.stochastic_rounding else None
        groups = [group["params"] for group in optimizer.param_groups]
        self.blocks = [Block(i, parameters, options.dtype) for i, parameters in enumerate(groups)]
        self.layer_blocks = {layer: self.blocks[index] for layer, index in layer_groups.items()}
        self._outside = [block for block in self.blocks if block.index not in layer_groups.values()]
        self._number = {p: i for i, p in enumerate(p for parameters in groups for p in parameters)}
        self.offload: StateOffload | None = None
        """None until the first step, since parameters may be moved to another device before it."""
        self._shown: dict[int, tuple[Tensor, int]] = {}
        """By block: the home whose views `state` exposes, and for how many parameters."""
        self.hooks: LayerHooks | None = None
        self._take_off: weakref.finalize[..., LayerStates] | None = None
        """Removes the hooks from the model, at the latest when this object is destroyed."""

    @property
    def mode(self) -> str:
        """`resident` or `move`; the option itself before the first step."""
        return self._options.offload if self.offload is None else self.offload.mode

    @property
    def why(self) -> str:
        """Reason for the current mode."""
        return "nothing has trained yet" if self.offload is None else self.offload.why

    def awake(self, active: Sequence[int]) -> list[Block]:
        """Blocks that train while the layers `active` train, in the model's order."""
        chosen = [*self._outside, *(self.layer_blocks[layer] for layer in active)]
        return sorted(chosen, key=lambda block: block.index)

    def check_device(self, device: torch.device) -> None:
        """Raise if the parameters are not on the device for which moments are kept.

        Raises:
            RuntimeError: the model was moved after the moments were loaded.
        """
        if self.offload is not None and self.offload.device != device:
            raise RuntimeError(
                f"the model was moved to {device} after the optimizer's state was loaded for {self.offload.device}: "
                "move the model first, then load the state"
            )

    def change(self, active: Sequence[int], accumulation_steps: int) -> None:
        """From now on, the layers `active` train."""
        if self.offload is None:
            return
        awake = self.awake(active)
        asleep = [block for block in self.blocks if block not in awake]
        keep = self._options.state == "keep"
        self.offload.change(asleep, awake, keep=keep)
        for block in self.blocks:
            self._show(block)
        if self.hooks is not None:
            self.hooks.change(active, accumulation_steps)

    def update(self, active: Sequence[int], accumulation_steps: int) -> tuple[int, Callable[[], float | None]]:
        """One AdamW step of every parameter that has a gradient.

        Returns:
            Bytes of moments copied since the last update, and a function that returns the seconds for which computation
            waited for copies.
        """
        if self.offload is None:
            self._start(self._new_offload(), active, accumulation_steps)
        offload = self.offload
        assert offload is not None
        trained = [b for b in self.awake(active) if any(p.grad is not None for p in b.parameters)]
        for block in trained:
            for p in block.parameters:
                # setdefault with a plain dictionary: the optimizer's state is a defaultdict, which grows when it is
                # read
                self._optimizer.state.setdefault(p, {"step": 0})["step"] += p.grad is not None
        offload.update(trained, self._update_chunk)
        for block in trained:
            self._show(block)
        offload.release_done()
        if self.hooks is not None:
            self.hooks.step_done(accumulation_steps)
        moved, offload.moved_bytes = offload.moved_bytes, 0
        return moved, offload.streams.exposed()

    def _update_chunk(self, block: Block, chunk: Chunk, moments: Tensor) -> None:
        update_pieces(self._pieces(block, chunk, moments), self._optimizer.param_groups[block.index])

    def _pieces(self, block: Block, chunk: Chunk, moments: Tensor) -> Iterator[Entries]:
        """Pieces of a chunk whose parameters have gradients, with the moments in its buffer."""
        # the kernel that serves one dtype has no temporaries
        whole = self._rounding is None and all(p.dtype == block.dtype for p in block.parameters)
        for piece in chunk.whole if whole else chunk.pieces:
            p = block.parameters[piece.parameter]
            if p.grad is None:
                continue
            count = piece.end - piece.start
            first, second = piece.moments(moments, piece.offset - chunk.start)
            weight, gradient = flat(p).narrow(0, piece.start, count), flat(p.grad).narrow(0, piece.start, count)
            step, bits = self._optimizer.state[p]["step"], None
            if self._rounding is not None:
                bits = self._rounding.generator(p.device, parameter=self._number[p], step=step, start=piece.start)
            yield Entries(weight, gradient, first, second, step, bits)

    def _new_offload(self) -> StateOffload:
        devices = {p.device for block in self.blocks for p in block.parameters}
        if len(devices) > 1:
            named = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"the model's parameters are on several devices ({named}): put the model on one")
        return StateOffload(self.blocks, devices.pop(), self._options.offload)

    def _start(self, offload: StateOffload, active: Sequence[int], accumulation_steps: int) -> None:
        self.offload = offload
        if offload.mode == "move" or offload.apart:
            lowest = min(block.index for block in self.layer_blocks.values())
            below = any(block.index < lowest for block in self._outside)
            hooks = LayerHooks(offload, self._layers, self.layer_blocks, outside=self._outside, below=below)
            hooks.change(active, accumulation_steps)
            self.hooks = hooks
            # otherwise the model's hooks would keep the moments of a deleted optimizer alive
            self._take_off = weakref.finalize(self, hooks.remove)
            self._take_off.atexit = False

    def _show(self, block: Block) -> None:
        """Point the optimizer's `state` at the current home of the moments, if it does not already."""
        state, home = self._optimizer.state, block.home
        if home is None:
            self._shown.pop(block.index, None)
            for p in block.parameters:
                state.pop(p, None)
            return
        known = [number for number, p in enumerate(block.parameters) if p in state]
        shown = self._shown.get(block.index)
        if shown is not None and shown[0] is home and shown[1] == len(known):
            return
        for number in known:
            first, second = block.view(number)
            state[block.parameters[number]].update(exp_avg=first, exp_avg_sq=second)
        self._shown[block.index] = home, len(known)

    # ------------------------------------------------------------ resume

    def settle(self) -> None:
        """Wait until the moments in `state` are up to date."""
        if self.offload is not None:
            self.offload.settle()

    def to_save(self, moments: dict[str, Any]) -> dict[str, Any]:
        """One parameter's state for a state dict: fp32 moments within a block of packed ones are copied out of it.

        torch saves no storage that is seen as two dtypes.
        """
        if self._options.dtype != PACKED:
            return moments
        small = {key: value for key, value in moments.items() if isinstance(value, Tensor) and value.dtype != PACKED}
        return {**moments, **{key: value.clone() for key, value in small.items()}}

    def load(self, state_dict: dict[str, Any], active: Sequence[int], accumulation_steps: int) -> None:
        """Load the moments of an optimizer's state dict, from any device, and place each where this optimizer keeps it.

        Raises:
            ValueError: moments of another dtype than this optimizer keeps.
        """
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        saved = {p: state_dict["state"].get(n) for p, n in zip(self._number, numbers, strict=True)}
        for p, moments in saved.items():
            wanted = stored_dtype(p.numel(), self._options.dtype)
            if moments is not None and "exp_avg" in moments and moments["exp_avg"].dtype != wanted:
                raise ValueError(
                    f"the saved moments are {moments['exp_avg'].dtype}, this optimizer keeps {wanted}: "
                    "build it with the state_dtype it was saved with"
                )
        # the moments may be views of this optimizer's own, as in opt.load_state_dict(opt.state_dict())
        self.settle()
        trained = [block for block in self.blocks if any(saved[p] is not None for p in block.parameters)]
        offload = self._new_offload() if trained else None
        loaded = [] if offload is None else [self._loaded(offload, block, saved) for block in trained]
        self._optimizer.state.clear()
        self.release()
        if offload is None:
            return
        for block, host in zip(trained, loaded, strict=True):
            offload.put_home(block, host)
        for p, moments in saved.items():
            if moments is not None:
                self._optimizer.state[p] = {"step": int(moments["step"])}
        self._start(offload, active, accumulation_steps)
        self.change(active, accumulation_steps)

    def _loaded(self, offload: StateOffload, block: Block, saved: dict[nn.Parameter, Any]) -> Tensor:
        """A new host block of `offload` with the moments of `block` that are in `saved`, and zeros for the rest."""
        host = offload.arena.take(block.elements, block.dtype)
        for number, p in enumerate(block.parameters):
            moments = saved[p]
            if moments is not None:
                for view, key in zip(block.view(number, host), ("exp_avg", "exp_avg_sq"), strict=True):
                    view.copy_(moments[key])
        return host

    def release(self) -> None:
        """Forget all moments and remove the hooks."""
        if self._take_off is not None:
            self._take_off()
        self._shown = {}
        if self.offload is not None:
            self.offload.release()
            for block in self.blocks:
                self.offload.forget(block)
            self.offload.release()
        self.offload = self.hooks = self._take_off = None
