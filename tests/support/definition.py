"""GRASS and LISA held to their definitions by other code than their own: float64, counts, hand arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from harness.checking.contract import Case
from harness.checking.tiny import LR, tiny_training
from harness.inputs.models import load_model, load_tokenizer
from harness.inputs.prompts import Prompt
from harness.inputs.rows import read_rows
from harness.inputs.tokens import encode_rows
from harness.step.loss import label_tokens, token_loss
from harness.training.batches import Batches, CalibrationBatches
from harness.training.schedule import lr_factor

from grass import find_layers


@dataclass
class Seen:
    """One step as an onlooker saw it."""

    active: tuple[int, ...]
    importance: list[float] | None
    probability: list[float] | None
    gradients: dict[str, torch.Tensor]
    """Before clipping, by parameter name."""
    lr: float


class Onlooker:
    """Drives a method by hand for some steps and keeps gradients, beliefs and weights."""

    def __init__(self, case: Case, steps: int, **recipe: Any) -> None:
        training = tiny_training(case.module, case.options, steps=steps, warmup_steps=0, **recipe)
        self.recipe = training.recipe
        method_class = case.method_class()
        self.method = method_class(method_class.Config.model_validate(case.options), recipe=self.recipe, lr=LR, seed=5)
        self.model = load_model(case.inputs.model, weight_dtype="fp32")
        tokenizer = load_tokenizer(case.inputs.model)
        rows, _ = encode_rows(
            Prompt("llm-adapters", tokenizer),
            read_rows(case.inputs.rows / "train.json"),
            max_length=96,
            loss_on=self.recipe.loss_on,
        )
        sizes = {"batch_size": self.recipe.batch_size, "micro_batch_size": self.recipe.micro_batch_size}
        self.batches = Batches(rows, **sizes, seed=5, pad_id=tokenizer.pad_token_id, device="cpu")
        self.layers = [dict(layer.named_parameters()) for layer in find_layers(self.model).layers]
        self.names = {id(p): name for name, p in self.model.named_parameters()}
        self.start = self.weights()
        self.method.attach(self.model)
        self.method.prepare(CalibrationBatches(self.batches))
        self.after_probe = self.weights()
        self.seen = [self._step(step) for step in range(steps)]

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def rms(self, layer: int, gradients: dict[str, torch.Tensor]) -> float:
        """Root mean square over *all* entries of a layer, in float64."""
        parameters = self.layers[layer].values()
        square = sum(float(gradients[self.names[id(p)]].double().square().sum()) for p in parameters)
        return math.sqrt(square / sum(p.numel() for p in parameters))

    def _step(self, step: int) -> Seen:
        self.method.set_lr_factor(lr_factor(step, self.recipe))
        self.method.begin_step(step)
        trace = self.method.trace()
        assert trace is not None
        batch = self.batches.step(step)[0]
        self.method.backward(token_loss(self.model, batch) / label_tokens(batch), last=True)
        gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        self.method.end_step(lambda: iter(()))
        return Seen(
            active=trace.active,
            importance=None if trace.importance is None else list(trace.importance),
            probability=None if trace.probability is None else list(trace.probability),
            gradients=gradients,
            lr=LR * lr_factor(step, self.recipe),
        )


def grass_differs(case: Case) -> str | None:
    """First difference between GRASS and the paper's definition on 12 steps, or None. Clipping bites at every step."""
    look = Onlooker(case, steps=12, max_grad_norm=0.05, weight_decay=0.01)
    options = look.method.options
    if any(not torch.equal(look.start[n], look.after_probe[n]) for n in look.start):
        return "probing moved weights"
    importance = _probed(look, case, options.probe_steps)
    window: dict[int, list[float]] = {}
    for step, seen in enumerate(look.seen):
        refresh_every = options.refresh_every or options.sample_every
        if options.sampler == "importance" and step and step % refresh_every == 0:
            for layer, values in window.items():
                importance[layer] = (
                    options.ema * math.fsum(values) / len(values) + (1 - options.ema) * importance[layer]
                )
            window = {}
        if not _close(seen.importance, importance):
            return f"step {step}: importance {seen.importance}, by hand {importance}"
        expected = _probabilities(importance, options)
        if not _close(seen.probability, expected):
            return f"step {step}: probability {seen.probability}, by hand {expected}"
        if len(set(seen.active)) != options.active_layers:
            return f"step {step}: {seen.active} are not {options.active_layers} distinct layers"
        if step % options.sample_every and seen.active != look.seen[step - 1].active:
            return f"step {step}: the active set changed within a period"
        for layer in seen.active:
            window.setdefault(layer, []).append(look.rms(layer, seen.gradients))
    return _weights_differ(look, forget=options.state == "reset")


def lisa_differs(case: Case) -> str | None:
    """The same for LISA's update rule."""
    look = Onlooker(case, steps=12, max_grad_norm=0.05, weight_decay=0.01)
    return _weights_differ(look, forget=look.method.options.state == "reset")


def draws_ignore_probability(case: Case) -> str | None:
    """Over 200 draws of one layer, the likeliest layer is drawn as often as the method's own probabilities say."""
    sharp = {**case.options, "active_layers": 1, "sample_every": 1, "refresh_every": None, "temperature": 0.3}
    look = Onlooker(Case(case.module, sharp, case.inputs, case.folder), steps=200)
    hits, expected, variance = 0.0, 0.0, 0.0
    for seen in look.seen:
        assert seen.probability is not None
        top = max(range(len(seen.probability)), key=seen.probability.__getitem__)
        p = seen.probability[top]
        hits, expected, variance = hits + (top in seen.active), expected + p, variance + p * (1 - p)
    z = (hits - expected) / math.sqrt(variance)
    return (
        f"likeliest layer drawn {hits:.0f} times in 200, {expected:.0f} expected (z = {z:.1f})"
        if abs(z) > 4.5
        else None
    )


def draws_not_uniform(case: Case) -> str | None:
    """LISA: over 200 draws of two layers every layer is in equally often (chi-square, one part in a million)."""
    every_step = {**case.options, "active_layers": 2, "sample_every": 1}
    look = Onlooker(Case(case.module, every_step, case.inputs, case.folder), steps=200)
    layers = len(look.layers)
    counts = [sum(layer in seen.active for seen in look.seen) for layer in range(layers)]
    expected = 200 * 2 / layers
    # inclusions of one draw exclude each other, which narrows their spread by (layers - 2) / (layers - 1)
    chi2 = sum((n - expected) ** 2 for n in counts) / (expected * (1 - 2 / layers)) * (layers - 1) / layers
    return f"inclusions {counts}, {expected:.0f} expected each (chi-square {chi2:.1f})" if chi2 > 31 else None


def _probed(look: Onlooker, case: Case, steps: int) -> list[float]:
    """Mean over the probe's batches of each layer's RMS gradient, on the untouched model, by `autograd.grad`."""
    model = load_model(case.inputs.model, weight_dtype="fp32")
    layers = [list(layer.parameters()) for layer in find_layers(model).layers]
    everything = [p for parameters in layers for p in parameters]
    means = [0.0] * len(layers)
    for batch in CalibrationBatches(look.batches).batches(steps):
        gradients = iter(torch.autograd.grad(token_loss(model, batch) / label_tokens(batch), everything))
        for layer, parameters in enumerate(layers):
            square = sum(float(next(gradients).double().square().sum()) for _ in parameters)
            means[layer] += math.sqrt(square / sum(p.numel() for p in parameters)) / steps
    return means


def _weights_differ(look: Onlooker, *, forget: bool) -> str | None:
    """AdamW in float64, each parameter with its own moments and step count, against the weights that came out."""
    weights = {name: w.double() for name, w in look.start.items()}
    state: dict[str, list[Any]] = {}
    layer_of = {look.names[id(p)]: i for i, layer in enumerate(look.layers) for p in layer.values()}
    previous: tuple[int, ...] = ()
    for step, seen in enumerate(look.seen):
        if forget and step % look.method.options.sample_every == 0:
            # LISA's restart forgets every layer; GRASS with state="reset" only those that fall asleep
            kept = (
                set(previous) & set(seen.active) if look.method.options.__class__.__name__ == "GrassOptions" else set()
            )
            for name in [n for n in state if n in layer_of and layer_of[n] not in kept]:
                del state[name]
        previous = seen.active
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in seen.gradients.values()))
        scale = min(1.0, look.recipe.max_grad_norm / (norm + 1e-6))
        for name, gradient in seen.gradients.items():
            if name in layer_of and layer_of[name] not in seen.active:
                return f"step {step}: sleeping layer {layer_of[name]} has a gradient"
            g = gradient.double() * scale
            first, second, count = state.get(name, [torch.zeros_like(g), torch.zeros_like(g), 0])
            count += 1
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            state[name] = [first, second, count]
            weights[name] = weights[name] * (1 - seen.lr * look.recipe.weight_decay) - seen.lr * (
                first / (1 - 0.9**count)
            ) / ((second / (1 - 0.999**count)).sqrt() + 1e-8)
    for name, ended in look.weights().items():
        gap = float((ended.double() - weights[name]).abs().max())
        if gap > 2e-5:
            return f"{name} ended {gap:.1e} away from AdamW with one step count a layer"
    return None


def _probabilities(importance: list[float], options: Any) -> list[float]:
    """By hand; with `auto`, tau by bisection until the entropy is the wanted one."""
    scaled = [m * len(importance) / math.fsum(importance) for m in importance]
    if options.temperature != "auto":
        return _softmax([m / options.temperature for m in scaled])
    wanted = math.log(max(options.target * len(scaled), options.active_layers + 1))
    low, high = 1e-6, 1e6
    while high / low > 1 + 1e-12:
        tau = math.sqrt(low * high)
        p = _softmax([m / tau for m in scaled])
        low, high = (tau, high) if -math.fsum(x * math.log(x) for x in p if x > 0) < wanted else (low, tau)
    return _softmax([m / high for m in scaled])


def _softmax(values: list[float]) -> list[float]:
    powers = [math.exp(v - max(values)) for v in values]
    return [p / math.fsum(powers) for p in powers]


def _close(one: list[float] | None, other: list[float]) -> bool:
    return one is not None and all(math.isclose(a, b, rel_tol=2e-4) for a, b in zip(one, other, strict=True))
