"""`Grass`, an optimizer that trains a few decoder layers at a time, drawn by gradient-based importance.

Source: "GRASS: Gradient-based Adaptive Layer-wise Importance Sampling for Memory-efficient Large Language Model
Fine-tuning" (arXiv 2604.07808, Findings of ACL 2026). What the paper leaves open is a named option;
`grass.options.Options` marks its default as "ours".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from grass.backward import stop_at_lowest_layer
from grass.belief import Belief
from grass.distributed import average_gradients, check_ranks
from grass.flags import Flags
from grass.host import current
from grass.importance import Importance, Norm, gradient_norms, root_mean_square
from grass.layers import OUTSIDE, find_layers, set_trainable
from grass.offload.states import LayerStates
from grass.options import Offload, Options, Reprobe, State, StateDtype
from grass.probing import Loss, Prober, end_probe_in_step
from grass.refusals import refuse_loss_scaling, refuse_unfit_model
from grass.sampling import Sampler
from grass.trace import History, Record


class Grass(Optimizer):
    """GRASS as a drop-in optimizer: `loss.backward(); opt.step(); opt.zero_grad()`.

    Call `probe(batches)` before training, or set `probe_steps`; samplers that measure nothing need neither. Weights
    change only in `step()`. Torch schedulers work as with any optimizer. Under `torch.distributed`, give every rank the
    plain module: `step()` averages gradients itself.

    What is frozen when it is built (`requires_grad` is False) stays so: it is not measured, not drawn and in no group.
    A second `Grass` on the same model does not take the first one's sleeping layers for frozen ones.

    Args:
        model: a causal language model with one stack of decoder layers, or any module if `layers` is given.
        layers: the decoder layers, bottom first, or the attribute path of their list ("model.language_model.layers"),
            if they cannot be found or others are wanted.
        lr: like all other options, explained in `grass.options.Options`, which also says whether it is the paper's.

    Raises:
        ValueError: an option out of range, or an unsupported model (wrapped, compiled, on the meta device, in fp16, or
            without an identifiable stack); the message says what to do.
    """

    _step_supports_amp_scaling = True  # makes a GradScaler set its attributes, so that it can be refused

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        active_layers: int = 4,
        sample_every: int = 50,
        refresh_every: int | None = None,
        probe_steps: int = 0,
        temperature: float | Literal["auto"] = "auto",
        target: float = 0.7,
        norm: Norm = "mean",
        ema: float = 0.5,
        train_embedding: bool = True,
        train_head: bool = True,
        train_final_norm: bool = True,
        state: State = "keep",
        sampler: Sampler = "importance",
        reprobe: Reprobe = False,
        offload: Offload = "auto",
        state_dtype: StateDtype = "fp32",
        stochastic_rounding: bool = False,
        accumulation_steps: int = 1,
        seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        layers: str | Sequence[nn.Module] | None = None,
    ) -> None:
        # the signature is for readers and editors; options are defined, explained and checked only in Options
        self.options = Options(**{k: v for k, v in locals().items() if k in Options.__dataclass_fields__})
        refuse_unfit_model(model)
        found = find_layers(model, layers=layers)
        self._flags = Flags(model)
        end_probe_in_step(model)
        self.layer_parameters = self._flags.layers(found.layer_parameters())
        """Parameters of each decoder layer that train when it is drawn; empty for a layer that the user froze."""
        frozen = [layer for layer, parameters in enumerate(self.layer_parameters) if not parameters]
        self.options.check_model(len(self.layer_parameters), frozen=len(frozen), parameters=self._flags.own)
        self.model = model
        self.accumulation_steps = accumulation_steps
        """Backward passes a step; may be changed between steps."""
        trained = {"embedding": train_embedding, "final_norm": train_final_norm, "head": train_head}
        own = {key: self._flags.own_of(found.outside[key]) for key in OUTSIDE}
        for key in OUTSIDE:
            set_trainable(own[key], trained[key])
        outside = {key: own[key] for key in OUTSIDE if trained[key] and own[key]}
        # in the model's own order, so that the global norm is bitwise equal to that of full fine-tuning
        below: list[dict[str, Any]] = [
            {"params": outside[key], "name": key} for key in ("embedding",) if key in outside
        ]
        stack = [{"params": own, "name": f"layer {i}"} for i, own in enumerate(self.layer_parameters) if own]
        above = [{"params": outside[key], "name": key} for key in ("final_norm", "head") if key in outside]
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__([*below, *stack, *above], hyper)

        drawable = [layer for layer in range(len(self.layer_parameters)) if layer not in frozen]
        first = {layer: len(below) + place for place, layer in enumerate(drawable)}
        self.states = LayerStates(self, found.layers, first, self.options)
        """The moments, and where they are kept."""
        self.belief = Belief(self.options, len(self.layer_parameters), frozen=frozen)
        """Layer importance, and the sampler that draws layers by it."""
        everything = [p for group in self.param_groups for p in group["params"]]
        self._prober = Prober(model, self.layer_parameters, everything)
        self.history = History()
        """One record per call of `step()`, probing steps included; not part of the state dict."""
        self.active: tuple[int, ...] = ()
        """Decoder layers that train now."""
        self._calls = 0
        """Calls of `step()`, probing steps included."""
        self._norms: dict[nn.Parameter, Tensor] = {}
        """Norm of every gradient of this step, in the model's order."""
        self._grad_norm: Tensor | None = None
        self.steps = 0
        """Updates done."""
        self._same_weights = False
        """Whether all ranks were found to hold the same weights, since construction or loading."""
        self._resample()
        if probe_steps and self.needs_probe:
            self._stop_at_lowest_layer()
            self._prober.start()
            self._flags.note()

    # ------------------------------------------------------------ what it believes

    @property
    def needs_probe(self) -> bool:
        """Whether the sampler needs mean gradient norms, which at first only a probe can give."""
        return self.belief.sampler.needs_probe

    @property
    def untouched(self) -> bool:
        """Whether `step()` was never called, neither here nor in the run that a loaded state comes from."""
        return self._calls == 0

    @property
    def importance(self) -> Importance | None:
        """Mean gradient norm m of every decoder layer, nan for one that the user froze; None before probing."""
        return self.belief.importance

    @property
    def probability(self) -> list[float]:
        """Probability p of the next single draw, one entry per decoder layer; 0 for one that the user froze."""
        return self.belief.probability

    @property
    def temperature(self) -> float | None:
        """Tau in use, in the unit of the option `norm`, infinite if draws are uniform; None before probing, and with
        samplers that use no temperature.
        """
        return self.belief.temperature

    @property
    def effective_layers(self) -> float:
        """exp(H(p)) of the current probabilities: from 1 to the number of layers."""
        return self.belief.effective_layers

    @property
    def age_steps(self) -> tuple[int, ...] | None:
        """Steps since each layer's importance was measured; None before probing."""
        return None if self.importance is None else tuple(self.steps - at for at in self.importance.measured_at)

    @property
    def last_grad_norm(self) -> float | None:
        """Global norm of the active gradients in the last step, before clipping; reading it waits for the device."""
        return None if self._grad_norm is None else current().number(self._grad_norm)

    # ------------------------------------------------------------ probing

    @property
    def probe_loss(self) -> Loss | None:
        """Loss of a probe's batch, as last passed to `probe`; None: `model(**batch).loss`.

        Set it in a resumed run that re-probes with a custom loss.
        """
        return self._prober.loss

    @probe_loss.setter
    def probe_loss(self, loss: Loss | None) -> None:
        self._prober.loss = loss

    def probe(self, batches: Iterable[Any], loss: Loss | None = None, *, exact: bool = False) -> None:
        """Measure every layer's mean gradient norm without updating anything, then draw the first active set.

        Each gradient is reduced to its norm and freed at once, so at most one parameter's gradient is alive. Afterwards
        the random number generators are restored, so dropout here does not change training.

        Args:
            batches: T_p micro-batches (paper: probing steps; the number is ours); each is one probing step.
            loss: mean loss of one batch; by default `model(**batch).loss`.
            exact: measure the gradient *accumulated* over `accumulation_steps` micro-batches, as in training, instead
                of each micro-batch's own. Every probing step then takes that many batches and runs them ceil(layers /
                active_layers) times, with the gradients of `active_layers` layers alive.

        Raises:
            ValueError: no batch, a gradient that is not finite, gradients left over from a backward pass, a call after
                the first step, or in-step probing (`probe_steps`) set as well.
            RuntimeError: the model was changed after `Grass` was built.
        """
        if self.steps:
            raise ValueError("probe() comes before training; this optimizer has made steps already")
        if self._prober.in_step is not None:
            raise ValueError("probe_steps makes step() probe by itself: leave it 0 to call probe()")
        self._check_unchanged()
        self.probe_loss = loss
        self._believe(self._measure_all(batches, exact=exact))

    def _measure_all(self, batches: Iterable[Any], *, exact: bool = False) -> list[float]:
        self._stop_at_lowest_layer()
        accumulated = self.accumulation_steps if exact else None
        return self._prober.measure(batches, exact=accumulated, together=self.options.active_layers)

    def _believe(self, means: Sequence[float]) -> None:
        self.belief.start(means)
        self._resample()

    def _probe_step(self) -> None:
        """A call of `step()` that only measures."""
        r = self._prober.take()
        self._remember((), r, moved_bytes=0, exposed=None)
        if len(self._prober.in_step or ()) == self.options.probe_steps:
            means = self._prober.stop()
            assert means is not None
            self._believe(means)

    # ------------------------------------------------------------ training

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Measure, clip and update the active parameters; then refresh and draw again if the period is over.

        The first `probe_steps` calls measure all layers and update nothing, but they consume their data, and a
        scheduler that is stepped along with them advances.

        Raises:
            RuntimeError: not probed yet, no gradient, a GradScaler calls this, ranks differ in options, weights,
                learning rates or steps, or, at the first step, the model was changed after `Grass` was built.
        """
        refuse_loss_scaling(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._same_weights:
            self._check_unchanged()
            # not before the first step: weights may be loaded after the optimizer is built
            self._check_ranks(weights=True)
            self._same_weights = True
        if self._prober.in_step is not None:
            self._probe_step()
            return loss
        if self.needs_probe and self.importance is None:
            raise RuntimeError("call opt.probe(batches) before the first step, or choose sampler='uniform'")
        self._stop_at_lowest_layer()
        average_gradients([p for block in self.states.awake(self.active) for p in block.parameters])
        r = self._measure()
        self._clip()
        moved, exposed = self.states.update(self.active, self.accumulation_steps)
        self._remember(self.active, r, moved, exposed)
        self.steps += 1
        if self.belief.sampler.refreshes and self.steps % self.options.refresh == 0:
            self._refresh()
        if self.steps % self.options.sample_every == 0:
            # this drops gradients of layers that are frozen now: zero_grad() would come too late for them
            self._resample()
        return loss

    def last_micro_batch(self) -> None:
        """Call before the last backward pass of a step; needed only if `accumulation_steps` varies."""
        if self.states.hooks is not None:
            self.states.hooks.last_micro_batch()

    def _measure(self) -> Tensor:
        """Norm of every gradient; r of the active layers (paper: after accumulation; ours: before clipping)."""
        graded = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not graded:
            raise RuntimeError("step() found no gradient of an active layer: call loss.backward() first")
        self._norms = dict(zip(graded, gradient_norms(graded), strict=True))
        measured = {}
        for layer in self.active:
            norms = [self._norms[p] for p in self.layer_parameters[layer] if p in self._norms]
            if norms:
                measured[layer] = root_mean_square(torch.stack(norms).square().sum(), self._count(layer))
        self.belief.note(measured)
        nothing = torch.zeros((), device=self._device)
        return torch.stack([measured.get(layer, nothing) for layer in self.active])

    def _clip(self) -> None:
        self._grad_norm = torch.linalg.vector_norm(torch.stack(list(self._norms.values())))
        if self.options.max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(list(self._norms), self.options.max_grad_norm, self._grad_norm)

    def _refresh(self) -> None:
        """Blend the window's measurements, or a new probe of all layers, into m, then recompute p (paper)."""
        probed = None
        if self.options.reprobe is not False:
            self.zero_grad()
            probed = self._measure_all(
                self.options.reprobe() if callable(self.options.reprobe) else self.options.reprobe
            )
        self.belief.refresh(steps=self.steps, probed=probed)

    def _resample(self) -> None:
        self.active = self._draw()
        self._check_ranks()
        for layer, parameters in enumerate(self.layer_parameters):
            set_trainable(parameters, layer in self.active)
        self._flags.note()
        self.states.change(self.active, self.accumulation_steps)

    # ------------------------------------------------------------ small

    def _check_ranks(self, *, weights: bool = False) -> None:
        facts = {
            **self.options.of_all_ranks(),
            "steps": self.steps,
            "frozen entries": f"{self._flags.frozen_entries:,}",
            "layers": list(self.active),
        }
        check_ranks(facts, self.model, self.param_groups, weights=weights)

    def _draw(self) -> tuple[int, ...]:
        """The next active set."""
        return self.belief.draw(steps=self.steps, trained=self.active if self.steps else ())

    def _check_unchanged(self) -> None:
        self._flags.check()
        self.states.check_device(self._device)

    def _count(self, layer: int) -> int:
        """N of a layer: its parameters, norm weights included, without those that the user froze."""
        return sum(p.numel() for p in self.layer_parameters[layer])

    @property
    def _device(self) -> torch.device:
        parameter: nn.Parameter = self.param_groups[0]["params"][0]
        return parameter.device

    def _stop_at_lowest_layer(self) -> None:
        """Keep backward from visiting layers below the lowest active one, unless the embedding trains."""
        if not any(group["name"] == "embedding" for group in self.param_groups):
            stop_at_lowest_layer(self.model)

    def _remember(
        self, active: tuple[int, ...], r: Tensor, moved_bytes: int, exposed: Callable[[], float | None] | None
    ) -> None:
        record = Record(
            step=self._calls,
            active=active,
            norm=(None,) * len(self.layer_parameters),
            importance=None if self.importance is None else self.importance.measured(),
            age=self.age_steps,
            probability=tuple(self.probability),
            effective_layers=self.effective_layers,
            temperature=self.temperature,
            mode=self.states.mode,
            moved_bytes=moved_bytes,
            exposed_copy_s=None,
        )
        self.history.append(record, norms=r, exposed=exposed, layers=active or self.belief.drawable)
        self._calls += 1

    # ------------------------------------------------------------ resume

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; only the constructor may do so.

        Raises: ValueError: called later; the model and the `train_*` options determine what trains.
        """
        if hasattr(self, "steps"):
            raise ValueError("Grass takes its parameters from the model: build it when the model is complete")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-exact resume needs: moments, active set, importance, probabilities, window, generator."""
        self.states.settle()
        packed = super().state_dict()
        packed["state"] = {number: self.states.to_save(moments) for number, moments in packed["state"].items()}
        packed["grass"] = {
            "steps": self.steps,
            "calls": self._calls,
            "active": self.active,
            "belief": self.belief.state_dict(),
            "probing": None if self._prober.in_step is None else [s.clone() for s in self._prober.in_step],
        }
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`; also sets the model's `requires_grad` flags.

        Moments keep their dtype and go to where this optimizer keeps them, whatever device they come from; the base
        class would cast them to the parameters' dtype and device.

        Raises:
            ValueError: saved with other groups, or with moments of another dtype.
        """
        self._refuse_other_groups([str(group.get("name")) for group in state_dict["param_groups"]])
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        own = state_dict["grass"]
        self.steps, self._calls = own["steps"], own["calls"]
        self.active = tuple(own["active"])
        self.belief.load_state_dict(own["belief"], self._device)
        self.history = History()
        self._same_weights = False
        if self._prober.in_step is not None:
            self._prober.stop()
        for layer, parameters in enumerate(self.layer_parameters):
            set_trainable(parameters, layer in self.active)
        self._flags.note()
        self.states.load(state_dict, self.active, self.accumulation_steps)
        if own["probing"] is not None:
            self._prober.start([squares.to(self._device, copy=True) for squares in own["probing"]])
            self._flags.note()

    def _refuse_other_groups(self, saved: Sequence[str]) -> None:
        here = [group["name"] for group in self.param_groups]
        if saved != here:
            there, only = (", ".join(sorted(set(a) - set(b))) or "none" for a, b in ((saved, here), (here, saved)))
            raise ValueError(
                f"this state was saved with other parts left out (trained in it alone: {there}; here alone: {only}): "
                "freeze the same parts, and give the same train_* options"
            )
