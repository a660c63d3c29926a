"""The probing phase, and options that are refused or warned about."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from grass_tiny import batch, grass_of, llama, same, train, weights
from torch import Tensor, nn

from grass import Grass, Options, find_layers
from grass.belief import Belief


def test_the_probe_changes_no_weight_leaves_no_gradient_and_restores_every_flag() -> None:
    model = llama()
    opt = Grass(model, lr=1e-2, active_layers=4, train_embedding=False)
    before, flags = weights(model), {name: p.requires_grad for name, p in model.named_parameters()}
    assert set(flags.values()) == {True, False}
    opt.probe([batch(0), batch(1)])
    assert same(before, weights(model))
    assert all(p.grad is None for p in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert not opt.state
    assert opt.steps == 0


def test_the_probe_holds_one_gradient_at_a_time() -> None:
    model = llama()
    opt = Grass(model, lr=1e-2, active_layers=4)
    alive: list[int] = []
    handles = [
        # called as soon as the gradient of `p` has been stored, before the optimizer's own hook of `p` frees it
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in model.parameters()))
        )
        for p in model.parameters()
    ]
    opt.probe([batch(0), batch(1)])
    for handle in handles:
        handle.remove()
    assert alive == [1] * 2 * sum(len(parameters) for parameters in opt.layer_parameters)


def test_the_probe_is_the_mean_over_batches_of_the_root_mean_square_gradient() -> None:
    model = llama()
    opt = Grass(model, lr=1e-2, active_layers=2)
    opt.probe([batch(0), batch(1)])
    assert opt.importance is not None
    reference = llama()
    expected = [0.0] * 4
    for seed in (0, 1):
        reference.zero_grad()
        reference(**batch(seed)).loss.backward()
        for layer, parameters in enumerate(find_layers(reference).layer_parameters()):
            entries = torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None])
            expected[layer] += float(entries.square().mean().sqrt()) / 2
    assert opt.importance.values == pytest.approx(expected, rel=1e-5)


def test_the_probe_refuses_what_it_cannot_measure() -> None:
    model = llama()
    opt = Grass(model, lr=1e-2, active_layers=4)
    with pytest.raises(ValueError, match=r"probe\(\) was given no batch"):
        opt.probe([])
    model(**batch(0)).loss.backward()
    with pytest.raises(
        ValueError, match=r"probe\(\) found gradients of an earlier backward pass: call opt.zero_grad\(\)"
    ):
        opt.probe([batch(0)])
    opt.zero_grad()
    with pytest.raises(
        ValueError, match="probing: the gradient norm of layer 0 is nan; check the loss and the weights"
    ):
        opt.probe([batch(0)], lambda m, b: m(**b).loss * float("nan"))
    assert all(p.grad is None for p in model.parameters())
    # and none of this spoilt it
    opt.probe([batch(0)])
    train(model, opt, 0, 1)
    with pytest.raises(ValueError, match=r"probe\(\) comes before training; this optimizer has made steps already"):
        opt.probe([batch(0)])


def test_a_failing_batch_leaves_no_hook_behind() -> None:
    model = llama()
    opt = Grass(model, lr=1e-2, active_layers=2)
    flags = [p.requires_grad for p in model.parameters()]

    def breaks(model: nn.Module, batch: Any) -> Tensor:
        raise KeyError("labels")

    with pytest.raises(KeyError):
        opt.probe([batch(0)], breaks)
    assert [p.requires_grad for p in model.parameters()] == flags
    model(**batch(0)).loss.backward()
    assert any(p.grad is not None for p in opt.layer_parameters[opt.active[0]])


def test_a_step_before_the_probe_is_refused() -> None:
    model = llama()
    opt = Grass(model, lr=1e-2, active_layers=2)
    model(**batch(0)).loss.backward()
    with pytest.raises(
        RuntimeError, match=r"call opt.probe\(batches\) before the first step, or choose sampler='uniform'"
    ):
        opt.step()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"active_layers": 0}, "active_layers must be at least 1, not 0"),
        ({"active_layers": 5}, "active_layers must be from 1 to 4 (the model's layers), not 5"),
        ({"sample_every": 0}, "sample_every must be at least 1, not 0"),
        ({"refresh_every": 4}, "refresh_every must be a multiple of sample_every (3), not 4"),
        ({"refresh_every": 0}, "refresh_every must be a multiple of sample_every (3), not 0"),
        ({"temperature": 0.0}, "temperature must be above 0 or 'auto', not 0.0"),
        ({"temperature": math.nan}, "temperature must be above 0 or 'auto', not nan"),
        ({"temperature": "warm"}, "temperature must be above 0 or 'auto', not 'warm'"),
        ({"target": 1.0}, "target must be above 0 and below 1 (a share of all layers), not 1.0"),
        ({"target": 0.0}, "target must be above 0 and below 1 (a share of all layers), not 0.0"),
        ({"ema": 1.1}, "ema must be from 0 to 1, not 1.1"),
        ({"norm": "median"}, "norm must be one of none, mean, sum, max, zscore, not 'median'"),
        (
            {"sampler": "importnace"},
            "sampler must be one of importance, uniform, inverse, topk, fixed, static, age, cyclic, not 'importnace'",
        ),
        ({"state": "drop"}, "state must be one of keep, reset, not 'drop'"),
    ],
)
def test_a_bad_option_is_named_in_one_sentence_with_the_model_untouched(options: dict[str, Any], said: str) -> None:
    model = llama()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError) as caught:
        Grass(model, **{"lr": 1e-2, "active_layers": 2, "sample_every": 3, **options})
    assert str(caught.value) == said
    assert [p.requires_grad for p in model.parameters()] == flags


def test_an_importance_that_says_nothing_is_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"GRASS is near uniform: 4\.00 of 4 layers effective.* lower `temperature`"):
        grass_of(llama(), temperature=100.0)


def test_a_collapsed_importance_is_a_warning() -> None:
    model = llama()
    with torch.no_grad():  # one layer whose gradients dwarf the others'
        for p in model.model.layers[2].parameters():
            p.mul_(1e-3)
    match = r"GRASS has collapsed: 1\.\d\d effective layers.*2 active.* raise `temperature`"
    with pytest.warns(UserWarning, match=match):
        grass_of(model, temperature=0.05)


def test_a_collapse_that_comes_with_a_refresh_is_a_warning_too_and_only_once() -> None:
    belief = Belief(Options(lr=1e-3, active_layers=1, temperature=0.15, ema=1.0), 4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        belief.start([1.0, 1.1, 1.2, 1.0])
        assert not said
        for steps in (5, 10):
            belief.note({0: torch.tensor(9.0)})
            belief.refresh(steps=steps)
    assert [str(w.message) for w in said] == [
        "GRASS has collapsed: 1.00 effective layers, 1 active after 5 steps; "
        "raise `temperature`, or set it to 'auto' to change that"
    ]


def test_a_healthy_importance_and_a_uniform_sampler_are_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grass_of(llama(), sampler="uniform")
        opt = grass_of(llama(layers=4), active_layers=1, temperature=0.15)
    assert 2 < opt.effective_layers < 0.95 * 4
