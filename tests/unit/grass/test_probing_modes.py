"""Probing inside `step()`, the exact norm under accumulation, and re-probing at each refresh."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from grass_tiny import batch, grass_of, llama, same, train, weights
from torch import Tensor, nn

from grass import Grass, find_layers
from grass.host import Host, using


def rms(parameters: list[nn.Parameter]) -> float:
    """Root mean square over all gradient entries, in float64."""
    entries = torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None])
    return float(entries.square().mean().sqrt())


def test_probing_inside_step_updates_nothing_and_then_draws() -> None:
    model = llama()
    opt = Grass(model, lr=1e-2, active_layers=2, sample_every=3, probe_steps=3, temperature=0.2)
    start = weights(model)
    for step in range(3):
        assert opt.importance is None
        train(model, opt, step, step + 1)
        assert same(start, weights(model))
    assert opt.importance is not None
    assert opt.steps == 0
    assert not opt.state
    # the same batches, probed outside, give the same importance, probabilities and draw
    outside = Grass(llama(), lr=1e-2, active_layers=2, sample_every=3, temperature=0.2)
    outside.probe([batch(0), batch(1), batch(2)])
    assert outside.importance == opt.importance
    assert (outside.probability, outside.active) == (opt.probability, opt.active)
    train(model, opt, 3, 4)
    assert not same(start, weights(model))
    assert [(r.step, r.active != (), r.importance is not None) for r in opt.history] == [
        (0, False, False), (1, False, False), (2, False, False), (3, True, True),
    ]  # fmt: skip
    assert all(norm is not None for norm in opt.history[0].norm)


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_run_that_stops_while_probing_resumes_bit_for_bit(stop: int) -> None:
    options: dict[str, Any] = {"lr": 1e-2, "active_layers": 2, "sample_every": 2, "probe_steps": 3}
    straight, first, second = llama(), llama(), llama()
    opt, before = Grass(straight, **options), Grass(first, **options)
    train(straight, opt, 0, 9)
    train(first, before, 0, stop)
    after = Grass(second, seed=9, **options)
    second.load_state_dict(first.state_dict())
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    train(second, after, stop, 9)
    assert same(weights(second), weights(straight))
    assert after.importance == opt.importance
    assert [r.step for r in after.history] == list(range(stop, 9))


def test_probing_inside_step_under_accumulation_measures_the_root_of_the_summed_squares() -> None:
    model, reference = llama(), llama()
    opt = Grass(model, lr=1e-2, active_layers=2, probe_steps=1, accumulation_steps=2)
    for seed in (0, 1):
        (model(**batch(seed)).loss / 2).backward()
    opt.step()
    squares = [0.0] * 4
    for seed in (0, 1):
        reference.zero_grad()
        (reference(**batch(seed)).loss / 2).backward()
        for layer, parameters in enumerate(find_layers(reference).layer_parameters()):
            squares[layer] += rms(parameters) ** 2
    assert opt.importance is not None
    assert opt.importance.values == pytest.approx([math.sqrt(s) for s in squares], rel=1e-5)


def test_samplers_that_measure_nothing_do_not_probe_inside_step() -> None:
    model = llama()
    opt = Grass(model, lr=1e-2, active_layers=2, sampler="uniform", probe_steps=3)
    start = weights(model)
    train(model, opt, 0, 1)
    assert not same(start, weights(model))


def test_probing_inside_step_and_outside_together_is_refused() -> None:
    opt = Grass(llama(), lr=1e-2, active_layers=2, probe_steps=3)
    with pytest.raises(ValueError, match=r"probe_steps makes step\(\) probe by itself: leave it 0 to call probe\(\)"):
        opt.probe([batch(0)])


@pytest.mark.parametrize("active", [1, 2, 3, 4])
def test_the_exact_probe_is_the_norm_of_the_accumulated_gradient(active: int) -> None:
    """Two probing steps of three micro-batches; any number of layers measured together gives the same."""
    model, reference = llama(), llama()
    opt = Grass(model, lr=1e-2, active_layers=active, accumulation_steps=3)
    opt.probe([batch(seed) for seed in range(6)], exact=True)
    expected = [0.0] * 4
    for first in (0, 3):
        reference.zero_grad()
        for seed in range(first, first + 3):
            (reference(**batch(seed)).loss / 3).backward()
        for layer, parameters in enumerate(find_layers(reference).layer_parameters()):
            expected[layer] += rms(parameters) / 2
    assert opt.importance is not None
    assert opt.importance.values == pytest.approx(expected, rel=1e-5)
    assert all(p.grad is None for p in model.parameters())
    # what each micro-batch's own gradient measures is another, larger number
    each = Grass(llama(), lr=1e-2, active_layers=active, accumulation_steps=3)
    each.probe([batch(seed) for seed in range(6)])
    assert each.importance is not None
    assert all(own > joint for own, joint in zip(each.importance.values, expected, strict=True))


def test_the_exact_probe_repeats_dropout_for_every_pass() -> None:
    values = []
    for active in (1, 4):
        model = llama()
        torch.manual_seed(3)
        for layer in model.model.layers:
            layer.mlp = nn.Sequential(layer.mlp, nn.Dropout(0.5))
        model.train()
        state = torch.get_rng_state()
        opt = Grass(model, lr=1e-2, active_layers=active, accumulation_steps=2)
        opt.probe([batch(0), batch(1)], exact=True)
        assert torch.equal(torch.get_rng_state(), state)
        assert opt.importance is not None
        values.append(opt.importance.values)
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_reprobing_measures_every_layer_at_each_refresh() -> None:
    model = llama()
    given: list[int] = []

    def batches() -> list[dict[str, Tensor]]:
        given.append(1)
        return [batch(50), batch(51)]

    opt = grass_of(model, reprobe=batches, ema=1.0, refresh_every=6)
    train(model, opt, 0, 6)
    assert len(given) == 1
    assert opt.importance is not None
    assert opt.importance.measured_at == [6] * 4
    fresh = Grass(copy.deepcopy(model).requires_grad_(True), lr=1e-2, active_layers=2)
    fresh.probe(batches())
    # with ema 1 nothing is left of the old: it is what a first probe of today's weights finds
    assert fresh.importance is not None
    assert opt.importance.values == pytest.approx(fresh.importance.values)
    assert all(p.grad is None for p in model.parameters())
    train(model, opt, 6, 12)
    assert len(given) == 3


def test_reprobing_takes_plain_batches_and_the_loss_of_the_first_probe() -> None:
    model = llama()
    losses = 0

    def loss(module: nn.Module, given: Any) -> Tensor:
        nonlocal losses
        losses += 1
        result: Tensor = module(**given).loss
        return result

    opt = Grass(model, lr=1e-2, active_layers=2, sample_every=2, reprobe=[batch(7)])
    opt.probe([batch(0)], loss)
    train(model, opt, 0, 4)
    assert losses == 3


def test_a_probe_puts_the_random_numbers_of_dropout_back() -> None:
    model = llama()
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, nn.Dropout(0.5))
    model.train()
    state = torch.get_rng_state()
    Grass(model, lr=1e-2, active_layers=2).probe([batch(0)])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_host_reads_norms_once_a_probe() -> None:
    opt = Grass(llama(), lr=1e-2, active_layers=2)
    reads: list[int] = []

    class Counted(Host):
        def numbers(self, values: Tensor) -> list[float]:
            reads.append(values.numel())
            return super().numbers(values)

    with using(Counted()):
        opt.probe([batch(seed) for seed in range(5)])
    assert reads == [5 * 4]


def test_a_step_without_any_gradient_is_refused() -> None:
    opt = Grass(llama(), lr=1e-2, active_layers=2, sampler="uniform")
    with pytest.raises(RuntimeError, match=r"step\(\) found no gradient of an active layer: call loss.backward\(\)"):
        opt.step()


def test_groups_cannot_be_added_later() -> None:
    opt = Grass(llama(), lr=1e-2, active_layers=2)
    with pytest.raises(ValueError, match="Grass takes its parameters from the model"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_moments_of_another_dtype_are_not_cast_but_refused() -> None:
    model = llama()
    opt = grass_of(model)
    train(model, opt, 0, 1)
    other = grass_of(llama(), state_dtype="bf16")
    with pytest.raises(ValueError, match=r"the saved moments are torch.float32, this optimizer keeps torch.bfloat16"):
        other.load_state_dict(opt.state_dict())


def test_a_parameter_without_a_flat_view_is_refused() -> None:
    model = llama()
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data = weight.data.t().contiguous().t()
    with pytest.raises(ValueError, match=r"the parameter model.layers.1.mlp.up_proj.weight is not contiguous: set its"):
        Grass(model, lr=1e-2, active_layers=2)


def test_stochastic_rounding_with_nothing_to_round_is_refused() -> None:
    said = r"stochastic_rounding has nothing to round: weights are torch.float32 and moments fp32"
    with pytest.raises(ValueError, match=said):
        Grass(llama(), lr=1e-2, active_layers=2, stochastic_rounding=True)
