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
from grass.sampling import draw_layers


class IgnoresProbability(Grass):
    def _draw(self) -> tuple[int, ...]:
        count = len(self.layer_parameters)
        return draw_layers([1.0] * count, self.options.active_layers, self.belief.sampler.generator)


class NeverRefreshes(Grass):
    def _refresh(self) -> None:
        pass


class NeverRotates(Grass):
    def _draw(self) -> tuple[int, ...]:
        return super()._draw() if self.steps == 0 else self.active


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
                    self.state.setdefault(p, {})["step"] = self.steps
        return super().step(closure)


class SwapsTheEmaWeights(Grass):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "ema": 1 - kwargs["ema"]})


class BuiltFromFrozenParameters(Grass):
    def _measure(self) -> Any:
        # the layers of the first draw are the only ones it ever knows
        self.known = getattr(self, "known", self.active)
        for layer in set(self.active) - set(self.known):
            for p in self.layer_parameters[layer]:
                p.grad = None
        return super()._measure()


class NeverDropsState(Grass):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "state": "keep"})


class LosesSleepingState(Grass):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "state": "reset"})


class MeasuresAfterClipping(Grass):
    def _measure(self) -> Any:
        limit = self.options.max_grad_norm
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), float("inf") if limit is None else limit)
        return super()._measure()


class ForgetsTheParameterCount(Grass):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prober._counts = [1] * len(self.layer_parameters)

    def _count(self, layer: int) -> int:
        return 1


class ProbesWithUpdates(Grass):
    def probe(self, batches: Any, loss: Any = None, *, exact: bool = False) -> None:
        super().probe(batches, loss, exact=exact)
        with torch.no_grad():
            self.layer_parameters[0][0].mul_(1.001)


class IgnoresTemperature(Grass):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "temperature": 1e9})


class NeverNormalises(Grass):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "norm": "none"})


class NeverClearsTheWindow(Grass):
    def _refresh(self) -> None:
        kept = dict(self.belief._window)
        super()._refresh()
        self.belief._window = kept


class DecaysSleepingLayers(Grass):
    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        with torch.no_grad():
            for parameters in self.layer_parameters:
                for p in parameters:
                    p.mul_(1 - 1e-4)
        return result


class DrawsOneTooFew(Grass):
    def _draw(self) -> tuple[int, ...]:
        return super()._draw()[1:]


class ForgetsItsGenerator(Grass):
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        before = self.belief.sampler.generator.get_state()
        super().load_state_dict(state_dict)
        self.belief.sampler.generator.set_state(before)


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
            self.optimizer.state.clear()
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
