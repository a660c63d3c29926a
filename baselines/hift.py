"""HiFT: hierarchical full-parameter fine-tuning (arXiv 2401.15207): each step trains the next group of layers.

The model's units are the embedding, the decoder layers and the head with the final norm; m units make a group. Every
optimizer step trains one group, in a cyclic order. Moments are kept on the host.

- Paper and code (misonsky/HiFT): the next group at every step, state kept and moved to the host, the order fixed once
  (`random`: shuffled once), and the *delayed* learning rate: all groups of a sweep train at the rate that the schedule
  had when the sweep began.
- The code chooses in `training_step`, so with gradient accumulation every micro-batch has another group. Here, a group
  is chosen for each optimizer step, as in the paper's algorithm.
- In the code the final norm of a Llama is a unit of its own; here it goes with the head, as in the paper's picture of
  embedding, layers and head. In a tied model, the shared tensor and the final norm are one unit (ours), since a step
  with the norm alone would train only a few thousand parameters.
- In the code the queue of units wraps if m does not divide their number, and a sweep is floor(units / m) steps. Here,
  groups are fixed and the last one may be smaller, so that a sweep trains every unit once (ours).

On a GPU, moments are copied to the device only for the update, synchronously, as in the code's own AdamW. So this
method's speed says nothing about state offloading in general; `grass` overlaps its copies with computation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from baselines.method import Expectation, LayerTrace, Method, ModelFacts, Options, StepFacts, adamw, moment_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, device, nn

    from baselines.method import Recipe


class HiftOptions(Options):
    """HiFT's block in the config."""

    group_units: int = Field(default=1, gt=0, description="m, units that train together; the code's examples use 1")
    order: Literal["bottom-up", "top-down", "random"] = Field(
        default="bottom-up", description="of the units; the code's down2up, up2down and random, which is shuffled once"
    )


class Hift(Method):
    """Every optimizer step trains the next group; all of a sweep's steps share one learning rate."""

    Config = HiftOptions
    PAPER = "arXiv 2401.15207"
    EXAMPLES: ClassVar[tuple[dict[str, Any], ...]] = (
        {"group_units": 1},
        {"group_units": 2, "order": "top-down"},
        {"group_units": 4, "order": "random"},
    )
    options: HiftOptions
    optimizer: Any

    def __init__(self, options: Options, *, recipe: Recipe, lr: float, seed: int) -> None:
        super().__init__(options, recipe=recipe, lr=lr, seed=seed)
        self.position = 0
        """The group that trains now or next; 0 at the start of a sweep."""

    def attach(self, model: nn.Module) -> nn.Module:
        """Split the units into groups, one parameter group each; everything is frozen until its step."""
        from grass.layers import find_layers

        self.model = model.requires_grad_(False)
        found = find_layers(model)
        embedding, norm, head = (found.outside[key] for key in ("embedding", "final_norm", "head"))
        units = [embedding, *found.layer_parameters(), [*norm, *head]] if head else [
            [*embedding, *norm], *found.layer_parameters()
        ]  # fmt: skip
        order, m = self._order(len(units)), self.options.group_units
        members = [order[start : start + m] for start in range(0, len(order), m)]
        self.groups = [[p for unit in group for p in units[unit]] for group in members]
        layers = len(found.layers)
        self.layers = [tuple(sorted(unit - 1 for unit in group if 1 <= unit <= layers)) for group in members]
        """Decoder layers in each group."""
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.optimizer = adamw([{"params": group} for group in self.groups], self.recipe, self.lr)
        return model

    def set_lr_factor(self, factor: float) -> None:
        """Delayed: takes effect only at the start of a sweep, for all its steps."""
        if self.position == 0:
            super().set_lr_factor(factor)

    def begin_step(self, step: int) -> None:
        """Activate the next group; backward stops at its lowest layer, also under activation checkpointing."""
        from grass.backward import stop_at_lowest_layer
        from grass.layers import set_trainable

        assert self.model is not None
        for number, parameters in enumerate(self.groups):
            set_trainable(parameters, number == self.position)
        stop_at_lowest_layer(self.model)

    def end_step(self, replay: Callable[[], Iterator[Tensor]]) -> StepFacts:
        """Clip and update the group; its moments are on the device only for that."""
        import torch

        self._move_moments(self.groups[self.position][0].device)
        facts = super().end_step(replay)
        self._move_moments(torch.device("cpu"))
        self.position = (self.position + 1) % len(self.groups)
        return facts

    def trace(self) -> LayerTrace:
        """The group that trains; HiFT has no importance."""
        names = tuple(self.names[id(p)] for p in self.groups[self.position])
        return LayerTrace(active=self.layers[self.position], tensors=names)

    def expect(self, facts: ModelFacts) -> Expectation:
        """One group moves at every step; every group visited so far has state."""
        return Expectation(
            layers="chosen",
            period_steps=1,
            rotates=len(self.groups) > 1,
            trainable_parameters=max(sum(p.numel() for p in group) for group in self.groups),
            state_bytes_per_parameter=moment_bytes(self.recipe),
            state_of="visited",
        )

    def state_dict(self) -> dict[str, Any]:
        """Moments, the sweep's rate and the place in the sweep; the order follows from the seed."""
        return {**super().state_dict(), "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`; moments go directly to the host, since they may not all fit on the device."""
        import torch

        saved = state["optimizer"]
        self.optimizer.load_state_dict({**saved, "state": {}})
        numbers = [number for group in saved["param_groups"] for number in group["params"]]
        parameters = [p for group in self.groups for p in group]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in saved["state"]:
                self.optimizer.state[parameter] = {
                    key: value.to("cpu", copy=True) if isinstance(value, torch.Tensor) else value
                    for key, value in saved["state"][number].items()
                }
        self.position = state["position"]

    def _order(self, units: int) -> list[int]:
        import torch

        if self.options.order == "random":
            return torch.randperm(units, generator=torch.Generator().manual_seed(self.seed)).tolist()
        ascending = list(range(units))
        return ascending if self.options.order == "bottom-up" else ascending[::-1]

    def _move_moments(self, where: device) -> None:
        """Move the moments of the current group to `where`, one parameter after the other."""
        for parameter in self.groups[self.position]:
            moments = self.optimizer.state.get(parameter, {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key in moments:
                    moments[key] = moments[key].to(where)
