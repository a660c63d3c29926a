"""Broken copies of GRASS and LISA, and of the contract's other duties. Each must be caught by some check.

The first three of LISA's are bugs that public ports really had.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from baselines.full import Full
from baselines.lisa import Lisa
from baselines.lora import Lora
from baselines.method import Method
from grass import Grass
from grass.adamw import new_moments
from grass.importance import probabilities
from grass.layers import set_trainable
from grass.offload import drop
from grass.sampling import draw_layers


class IgnoresProbability(Grass):
    def _resample(self) -> None:
        believed, self.probability = self.probability, [1.0] * len(self.probability)
        super()._resample()
        self.probability = believed


class NeverRefreshes(Grass):
    def _refresh(self) -> None:
        pass


class NeverRotates(Grass):
    def _resample(self) -> None:
        if self.steps == 0:
            super()._resample()


class DrawsEveryStep(Grass):
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self._resample()
        return result


class SharesOneStepCount(Grass):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p] = new_moments(p, self.state_dtype)
                    self.state[p]["step"] = self.steps
        return super().step(closure)


class SwapsTheEmaWeights(Grass):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ema = 1 - self.ema


class BuiltFromFrozenParameters(Grass):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for group in self.param_groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]


class NeverDropsState(Grass):
    def _resample(self) -> None:
        self.state_mode = "keep"
        super()._resample()


class LosesSleepingState(Grass):
    def _resample(self) -> None:
        self.state_mode = "reset"
        super()._resample()


class MeasuresAfterClipping(Grass):
    def _measure(self) -> None:
        pass

    def _clip(self) -> None:
        super()._clip()
        super()._measure()


class ForgetsTheParameterCount(Grass):
    def _count(self, layer: int) -> int:
        return 1


class ProbesWithUpdates(Grass):
    def probe(self, batches: Any, loss: Any = None) -> None:
        super().probe(batches, loss)
        with torch.no_grad():
            self.layer_parameters[0][0].mul_(1.001)


class IgnoresTemperature(Grass):
    def _update_probability(self) -> None:
        assert self.importance is not None
        self.probability = probabilities(self.importance.values, temperature=1e9, norm=self.norm)


class NeverNormalises(Grass):
    def _update_probability(self) -> None:
        assert self.importance is not None
        self.probability = probabilities(self.importance.values, temperature=self.temperature, norm="none")


class NeverClearsTheWindow(Grass):
    def _refresh(self) -> None:
        kept = dict(self._window)
        super()._refresh()
        self._window = kept


class DecaysSleepingLayers(Grass):
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        with torch.no_grad():
            for parameters in self.layer_parameters:
                for p in parameters:
                    p.mul_(1 - 1e-4)
        return result


class DrawsOneTooFew(Grass):
    def _resample(self) -> None:
        super()._resample()
        asleep, self.active = self.active[0], self.active[1:]
        set_trainable(self.layer_parameters[asleep], False)


class ForgetsItsGenerator(Grass):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before = self.generator.get_state()
        super().load_state_dict(state_dict)
        self.generator.set_state(before)


class LisaBuiltFromFrozen(Lisa):
    def attach(self, model: Any) -> Any:
        from baselines.method import adamw

        super().attach(model)
        self.active = draw_layers([1.0] * len(self.layer_parameters), self.options.active_layers, self.generator)
        self._freeze()
        self.optimizer = adamw([p for p in model.parameters() if p.requires_grad], self.recipe, self.lr)
        return model


class LisaKeepsStaleState(Lisa):
    def _forget_moments(self) -> None:
        pass


class LisaWithZeroGradients(Lisa):
    def end_step(self, replay: Any) -> Any:
        facts = super().end_step(replay)
        for parameters in self.layer_parameters:
            for p in parameters:
                p.grad = torch.zeros_like(p)
        return facts


class LisaNeverRotates(Lisa):
    def begin_step(self, step: int) -> None:
        if step == 0:
            super().begin_step(step)


class LisaIsNotUniform(Lisa):
    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        if step % self.options.sample_every == 0 and 0 not in self.active:
            self.active = (0, *self.active[1:])
            self._freeze()


class LisaForgetsEverything(Lisa):
    def begin_step(self, step: int) -> None:
        if step % self.options.sample_every == 0 and self.optimizer is not None:
            drop(self.optimizer, list(self.optimizer.state))
        super().begin_step(step)


class LisaForgetsTheDraw(Lisa):
    def load_state_dict(self, state: dict[str, Any]) -> None:
        asleep = [i for i in range(len(self.layer_parameters)) if i not in state["active"]]
        super().load_state_dict({**state, "active": tuple(asleep[:2])})


class FullWithoutSchedule(Full):
    def set_lr_factor(self, factor: float) -> None:
        pass


class FullWithCompoundingSchedule(Full):
    def set_lr_factor(self, factor: float) -> None:
        assert self.optimizer is not None
        for group in self.optimizer.param_groups:
            group["lr"] *= factor


class FullThatStepsEveryMicroBatch(Full):
    def backward(self, loss: Any, *, last: bool) -> None:
        super().backward(loss, last=last)
        if not last:
            super().end_step(lambda: iter(()))


class LoraExportsUnmerged(Lora):
    def export(self, path: Any) -> None:
        self.wrapped.unload().save_pretrained(path)


class LoraThawsTheBase(Lora):
    def attach(self, model: Any) -> Any:
        from baselines.method import adamw

        wrapped = super().attach(model)
        model.requires_grad_(True)
        self.optimizer = adamw([p for p in wrapped.parameters() if p.requires_grad], self.recipe, self.lr)
        return wrapped


@dataclass(frozen=True)
class Defect:
    """A broken class and the options under which its fault shows."""

    broken: type
    options: dict[str, Any]
    recipe_module: str

    @property
    def method(self) -> type[Method] | None:
        """The method class to put in place of the module's own; None where `grass.Grass` is to be replaced."""
        return self.broken if issubclass(self.broken, Method) else None


_GRASS = {"active_layers": 2, "sample_every": 3, "probe_steps": 2, "ema": 0.3}
_LISA = {"active_layers": 2, "sample_every": 3}
_LORA = {"rank": 4, "alpha": 8}

DEFECTS = [
    *(
        Defect(broken, {**_GRASS, "state": "reset"} if broken is NeverDropsState else _GRASS, "grass")
        for broken in (
            IgnoresProbability, NeverRefreshes, NeverRotates, DrawsEveryStep, SharesOneStepCount, SwapsTheEmaWeights,
            BuiltFromFrozenParameters, NeverDropsState, LosesSleepingState, MeasuresAfterClipping,
            ForgetsTheParameterCount, ProbesWithUpdates, IgnoresTemperature, NeverNormalises, NeverClearsTheWindow,
            DecaysSleepingLayers, DrawsOneTooFew, ForgetsItsGenerator,
        )
    ),
    *(
        Defect(broken, _LISA, "lisa")
        for broken in (
            LisaBuiltFromFrozen, LisaKeepsStaleState, LisaWithZeroGradients, LisaNeverRotates, LisaIsNotUniform,
            LisaForgetsEverything, LisaForgetsTheDraw,
        )
    ),
    Defect(FullWithoutSchedule, {}, "full"),
    Defect(FullWithCompoundingSchedule, {}, "full"),
    Defect(FullThatStepsEveryMicroBatch, {}, "full"),
    Defect(LoraExportsUnmerged, _LORA, "lora"),
    Defect(LoraThawsTheBase, _LORA, "lora"),
]  # fmt: skip
