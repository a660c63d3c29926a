"""`Grass`, an optimizer that trains a few decoder layers at a time, drawn by gradient-based importance.

Source: "GRASS: Gradient-based Adaptive Layer-wise Importance Sampling for Memory-efficient Large Language Model
Fine-tuning" (arXiv 2604.07808, Findings of ACL 2026). What the paper leaves open is a named option, its default marked
"ours".
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from grass.adamw import new_moments, restore_exactly, update_in_group
from grass.importance import Importance, Norm, effective_layers, gradient_square, probabilities, root_mean_square
from grass.layers import OUTSIDE, find_layers, set_trainable
from grass.offload import drop, fetch_to_device, send_to_host
from grass.sampling import draw_layers

Sampler = Literal["importance", "static", "uniform"]


class Grass(Optimizer):
    """GRASS as a drop-in optimizer: `loss.backward(); opt.step(); opt.zero_grad()`.

    Call `probe(batches)` before training; the first active set is drawn there. With `sampler="uniform"` no probe is
    needed. Weights change only in `step()`.

    Args:
        model: a causal language model with one stack of decoder layers, or any module if `layers` is given.
        lr: peak learning rate of every group; torch schedulers act on it as usual.
        active_layers: gamma, layers that train in a period (paper; its value is not known, 4 is ours).
        sample_every: T_s, steps between two draws (paper: 25 to 50 is best).
        refresh_every: T_u, steps between two refreshes of the probabilities, a multiple of `sample_every`
            (paper; default ours: `sample_every`).
        temperature: tau of the softmax (paper; value ours).
        norm: scaling of the mean gradient norms before the softmax (ours: the paper names none).
        ema: alpha, weight of the new measurement in a refresh (paper; value ours).
        sampler: `importance` is the paper's method; `static` is its GRASS*, probabilities from the probe for ever;
            `uniform` draws like LISA and never probes.
        state: `keep` sends the moments of sleeping layers to the host and brings them back (paper); `reset` forgets
            them.
        train_embedding, train_head, train_final_norm: groups outside the stack that always train (ours: all three).
        state_dtype: dtype of the moments.
        betas, eps, weight_decay: AdamW's.
        max_grad_norm: clip the global norm of the active gradients inside `step`, after importance was measured.
        seed: of the draws' own generator.
        layers: the decoder layers, where they cannot be found.

    Raises:
        ValueError: an option out of range; the message names it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        active_layers: int = 4,
        sample_every: int = 50,
        refresh_every: int | None = None,
        temperature: float = 1.0,
        norm: Norm = "mean",
        ema: float = 0.5,
        sampler: Sampler = "importance",
        state: Literal["keep", "reset"] = "keep",
        train_embedding: bool = True,
        train_head: bool = True,
        train_final_norm: bool = True,
        state_dtype: torch.dtype = torch.float32,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        seed: int = 0,
        layers: Sequence[nn.Module] | None = None,
    ) -> None:
        for name, given, valid in (
            ("norm", norm, get_args(Norm)),
            ("sampler", sampler, get_args(Sampler)),
            ("state", state, ("keep", "reset")),
        ):
            if given not in valid:
                raise ValueError(f"{name} must be one of {', '.join(valid)}, not {given!r}")
        found = find_layers(model, layers=layers)
        self.layer_parameters = found.layer_parameters()
        self.refresh_every = sample_every if refresh_every is None else refresh_every
        _check_options(len(self.layer_parameters), active_layers, sample_every, self.refresh_every, temperature, ema)
        self.model = model
        self.active_layers = active_layers
        self.sample_every = sample_every
        self.temperature = temperature
        self.norm: Norm = norm
        self.ema = ema
        self.sampler: Sampler = sampler
        self.state_mode = state
        self.state_dtype = state_dtype
        self.max_grad_norm = max_grad_norm
        self.generator = torch.Generator().manual_seed(seed)
        trained = {"embedding": train_embedding, "final_norm": train_final_norm, "head": train_head}
        for key in OUTSIDE:
            set_trainable(found.outside[key], trained[key])
        outside = {key: found.outside[key] for key in OUTSIDE if trained[key] and found.outside[key]}
        # in the model's own order, so that the global norm is summed as full fine-tuning sums it, to the last bit
        named = [(key, outside[key]) for key in ("embedding",) if key in outside]
        named += [(f"layer {i}", parameters) for i, parameters in enumerate(self.layer_parameters)]
        named += [(key, outside[key]) for key in ("final_norm", "head") if key in outside]
        groups = [{"params": parameters, "name": name} for name, parameters in named]
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

        count = len(self.layer_parameters)
        self.steps = 0
        self.importance: Importance | None = None
        self.probability = [1 / count] * count
        self.active: tuple[int, ...] = ()
        self.last_grad_norm: float | None = None
        """Global norm of the active gradients in the last step, before clipping."""
        self._window: dict[int, tuple[Tensor, int]] = {}
        """Per layer: sum of r over the steps since the last refresh in which it was active, and their number."""
        self._resample()

    # ------------------------------------------------------------ probing

    def probe(self, batches: Iterable[Any], loss: Callable[[nn.Module, Any], Tensor] | None = None) -> None:
        """Measure every layer's mean gradient norm without updating anything, then draw the first active set.

        Gradients are reduced to their norm and freed as they appear, so at most one parameter's gradient is alive.
        Each batch is one probing step: the norm is that of the batch's own gradient (no accumulation).

        Args:
            batches: T_p batches (paper: probing steps; the number is ours).
            loss: mean loss of one batch; by default `model(**batch).loss`.

        Raises:
            ValueError: no batch, a gradient that is not finite, or gradients left over from a backward pass.
        """
        if self.steps:
            raise ValueError("probe() comes before training; this optimizer has made steps already")
        totals = [0.0] * len(self.layer_parameters)
        steps = 0
        with self._norms_of_all_layers() as squares:
            for batch in batches:
                (loss(self.model, batch) if loss is not None else self.model(**batch).loss).backward()
                for layer, square in enumerate(squares.tolist()):
                    totals[layer] += (square / self._count(layer)) ** 0.5
                squares.zero_()
                steps += 1
        if not steps:
            raise ValueError("probe() was given no batch")
        self.importance = Importance.from_probe([total / steps for total in totals])
        self._update_probability()
        self._resample()

    @contextmanager
    def _norms_of_all_layers(self) -> Iterator[Tensor]:
        """Yield one squared gradient norm a layer, filled by every backward pass; gradients never accumulate."""
        everything = [p for group in self.param_groups for p in group["params"]]
        if any(p.grad is not None for p in everything):
            raise ValueError("probe() found gradients of an earlier backward pass: call opt.zero_grad() first")
        before = [(p, p.requires_grad) for p in everything]
        squares = torch.zeros(
            len(self.layer_parameters), dtype=torch.float32, device=self.layer_parameters[0][0].device
        )

        def reduce(layer: int) -> Callable[[Tensor], None]:
            def hook(parameter: Tensor) -> None:
                assert parameter.grad is not None
                squares[layer] += torch.linalg.vector_norm(parameter.grad, dtype=torch.float32).square()
                parameter.grad = None

            return hook

        set_trainable(everything, False)
        handles = []
        for layer, parameters in enumerate(self.layer_parameters):
            set_trainable(parameters, True)
            handles += [p.register_post_accumulate_grad_hook(reduce(layer)) for p in parameters]
        try:
            yield squares
        finally:
            for handle in handles:
                handle.remove()
            for parameter, trainable in before:
                set_trainable([parameter], trainable)

    # ------------------------------------------------------------ training

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Measure, clip, update what is active; then refresh and draw again if the period is over."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.sampler != "uniform" and self.importance is None:
            raise RuntimeError("call opt.probe(batches) before the first step, or choose sampler='uniform'")
        self._measure()
        self._clip()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    if not self.state[parameter]:
                        self.state[parameter] = new_moments(parameter, self.state_dtype)
                    update_in_group(parameter, self.state[parameter], group)
        self.steps += 1
        if self.sampler == "importance" and self.steps % self.refresh_every == 0:
            self._refresh()
        if self.steps % self.sample_every == 0:
            # gradients of layers that now fall asleep are dropped here: zero_grad() comes too late for them
            self._resample()
        return loss

    @property
    def effective_layers(self) -> float:
        """exp(H(p)) of the probabilities now in force."""
        return effective_layers(self.probability)

    @property
    def age_steps(self) -> tuple[int, ...] | None:
        """Steps since each layer's importance was measured; None before probing."""
        return None if self.importance is None else tuple(self.steps - at for at in self.importance.measured_at)

    def _measure(self) -> None:
        if self.sampler != "importance":
            return
        for layer in self.active:
            square = gradient_square(self.layer_parameters[layer])
            if square is not None:
                r = root_mean_square(square, self._count(layer))
                total, steps = self._window.get(layer, (torch.zeros_like(r), 0))
                self._window[layer] = (total + r, steps + 1)

    def _clip(self) -> None:
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        limit = self.max_grad_norm if self.max_grad_norm is not None else float("inf")
        self.last_grad_norm = float(nn.utils.clip_grad_norm_(trained, limit))

    def _refresh(self) -> None:
        assert self.importance is not None
        measured = {layer: float(total) / steps for layer, (total, steps) in self._window.items()}
        self.importance.refresh(measured, ema=self.ema, step=self.steps)
        self._window = {}
        self._update_probability()

    def _update_probability(self) -> None:
        assert self.importance is not None
        if self.sampler != "uniform":
            first = self.importance.measured_at == [0] * len(self.layer_parameters)
            self.probability = probabilities(self.importance.values, temperature=self.temperature, norm=self.norm)
            if first:
                self._warn_if_not_adaptive()

    def _warn_if_not_adaptive(self) -> None:
        count, effective = len(self.layer_parameters), self.effective_layers
        if effective > 0.95 * count:
            found, mend = f"is near uniform: {effective:.2f} of {count} layers effective", "lower"
        elif effective < self.active_layers + 1 and count > self.active_layers:
            found, mend = f"has collapsed: {effective:.2f} effective layers, {self.active_layers} active", "raise"
        else:
            return
        warnings.warn(f"GRASS {found} after probing; {mend} `temperature` to change that", stacklevel=4)

    def _resample(self) -> None:
        self.active = draw_layers(self.probability, self.active_layers, self.generator)
        for layer, parameters in enumerate(self.layer_parameters):
            awake = layer in self.active
            set_trainable(parameters, awake)
            if awake:
                fetch_to_device(self, parameters)
            elif self.state_mode == "keep":
                send_to_host(self, parameters)
            else:
                drop(self, parameters)

    def _count(self, layer: int) -> int:
        return sum(p.numel() for p in self.layer_parameters[layer])

    # ------------------------------------------------------------ resume

    def state_dict(self) -> dict[str, Any]:
        """Everything a bit-exact resume needs: moments, active set, importance, probabilities, window, generator."""
        packed = super().state_dict()
        packed["grass"] = {
            "steps": self.steps,
            "importance": None
            if self.importance is None
            else (list(self.importance.values), list(self.importance.measured_at)),
            "probability": list(self.probability),
            "active": self.active,
            "window": {layer: (total.clone(), steps) for layer, (total, steps) in self._window.items()},
            "generator": self.generator.get_state(),
        }
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`; also puts the model's `requires_grad` flags in order."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "grass"})
        restore_exactly(self, state_dict)
        own = state_dict["grass"]
        self.steps = own["steps"]
        self.importance = None if own["importance"] is None else Importance(*(list(part) for part in own["importance"]))
        self.probability = list(own["probability"])
        self.active = tuple(own["active"])
        self._window = {int(layer): (total.clone(), steps) for layer, (total, steps) in own["window"].items()}
        self.generator.set_state(own["generator"].cpu())
        for layer, parameters in enumerate(self.layer_parameters):
            set_trainable(parameters, layer in self.active)


def _check_options(
    layers: int, active: int, sample_every: int, refresh_every: int, temperature: float, ema: float
) -> None:
    if not 1 <= active <= layers:
        raise ValueError(f"active_layers must be from 1 to {layers} (the model's layers), not {active}")
    if sample_every < 1:
        raise ValueError(f"sample_every must be at least 1, not {sample_every}")
    if refresh_every < 1 or refresh_every % sample_every:
        raise ValueError(f"refresh_every must be a multiple of sample_every ({sample_every}), not {refresh_every}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    if not 0 <= ema <= 1:
        raise ValueError(f"ema must be from 0 to 1, not {ema}")
