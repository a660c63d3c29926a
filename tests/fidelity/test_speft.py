"""SPEFT's choice of entries and its update, by the definition and beside dense AdamW with masked gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from driving import Batch, Calibration, attached, gap, masked, method_of, run
from grass_tiny import batch, llama, same, weights
from torch import Tensor, nn

from baselines import speft
from baselines.matrices import matrices_of
from baselines.speft import Best, Speft
from grass.adamw import AdamW

OPTIONS = {"density": 0.05, "calibration_rows": 4}


def chosen(method: Any) -> list[Tensor]:
    """Masks of all linear matrices, bottom first."""
    masks = []
    for weight in matrices_of(method.model):
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        if weight in method.optimizer.state:
            mask[method.optimizer.state[weight]["index"].long()] = True
        masks.append(mask.view(weight.shape))
    return masks


def test_the_k_best_of_all_matrices_together_are_kept() -> None:
    """Worked example of `sparse_global_topk` (0-ml/speft, model/sparse_peft.py), k = 3.

    The first matrix has the scores 5 1 4 at places 0 to 2, the second 2 9 at places 3 and 4, the third 3 at place 5: 9,
    5 and 4 are the largest. One each (its local top-k) would be 5, 9 and 3.
    """
    best, seen = Best(3), []
    for scores, first in (([5.0, 1.0, 4.0], 0), ([2.0, 9.0], 3), ([3.0], 5)):
        best.offer(torch.tensor(scores), first)
        seen.append(sorted(best.places.tolist()))
    assert seen == [[0, 1, 2], [0, 2, 4], [0, 2, 4]]


class TurningSigns(Calibration):
    """The gradient of the first matrix is +1, -1, +1, -1 over four batches, that of the second 0.1 in each."""

    def batches(self, count: int) -> Iterator[Batch]:
        return (masked(batch(number)) | {"sign": torch.full((2,), (-1.0) ** number)} for number in range(count))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        first, second, *others = matrices_of(model)
        return batch["sign"][0] * first.sum() + 0.1 * second.sum() + 0 * sum(p.sum() for p in others)


def in_the_second(method: type[Speft], name: str = "gradient") -> float:
    """Share of 100 chosen entries that lie in the second matrix under `TurningSigns`."""
    found = method_of(method, {"k": 100, "calibration_rows": 8, "salience": name})
    found.attach(llama()).train()
    found.prepare(TurningSigns())
    return float(chosen(found)[1].sum()) / 100


def test_gradients_are_averaged_before_their_absolute_value_is_taken() -> None:
    """0-ml/speft, `compute_gradient_based_scores`: |mean g|, in which signs cancel; Fisher's mean of g^2 keeps them."""
    assert in_the_second(Speft) == 1.0
    assert in_the_second(Speft, "snip") == 1.0
    assert in_the_second(Speft, "fisher") == 0.0


def scores_by_hand(name: str) -> Tensor:
    """Salience of every linear entry of the tiny Llama on its two calibration batches, in float64."""
    model = llama().double()
    matrices = matrices_of(model)
    rows = [masked(batch(1000 + number)) for number in range(2)]
    if name == "fisher":
        rows = [{key: value[i : i + 1] for key, value in b.items()} for b in rows for i in range(2)]
    each = [torch.autograd.grad(model(**b).loss, matrices) for b in rows]
    scores = []
    for number, weight in enumerate(matrices):
        g = torch.stack([gradients[number] for gradients in each])
        scores.append({
            "gradient": g.mean(0).abs(),
            "snip": (weight * g.mean(0)).abs(),
            "fisher": g.square().mean(0),
            "magnitude": weight.abs(),
        }[name])  # fmt: skip
    return torch.cat([s.detach().flatten() for s in scores])


@pytest.mark.parametrize("name", ["gradient", "snip", "fisher", "magnitude"])
def test_chosen_entries_are_the_most_salient_of_the_model(name: str) -> None:
    """0-ml/speft, score functions; float64 by another route. Entries within rounding of the k-th may go either way."""
    method = attached(method_of(Speft, {**OPTIONS, "salience": name}))
    mask, scores = torch.cat([m.flatten() for m in chosen(method)]), scores_by_hand(name)
    assert int(mask.sum()) == method.k == int(0.05 * scores.numel())
    limit = scores.topk(method.k).values[-1]
    assert bool((scores[mask] > limit * (1 - 1e-4)).all())
    assert bool((scores[~mask] < limit * (1 + 1e-4)).all())
    layers = torch.stack([m.double().mean() for m in mask.split(mask.numel() // 4)])
    assert method.trace().importance == pytest.approx(layers.tolist())


def test_layers_measured_together_give_the_same_choice() -> None:
    one, three = (chosen(attached(method_of(Speft, {**OPTIONS, "layers_together": n}))) for n in (1, 3))
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_random_salience_is_the_seeds_and_spares_no_matrix() -> None:
    one, again, other = (
        chosen(attached(method_of(Speft, {"density": 0.2, "salience": "random"}, seed=seed))) for seed in (3, 3, 4)
    )
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert all(0.08 < float(mask.double().mean()) < 0.35 for mask in one)


def test_exactly_the_chosen_entries_move() -> None:
    """With k = 300, 300 entries of the whole model differ after six steps, all in the mask, weight decay on."""
    method = attached(method_of(Speft, {"k": 300, "calibration_rows": 4}, weight_decay=0.1))
    before = weights(method.model)
    run(method, 0, 6)
    after = weights(method.model)
    assert sum(int((before[name] != after[name]).sum()) for name in before) == 300
    names = {id(p): name for name, p in method.model.named_parameters()}
    for weight, mask in zip(matrices_of(method.model), chosen(method), strict=True):
        assert torch.equal(before[names[id(weight)]] != after[names[id(weight)]], mask)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(method.trace().tensors)


def beside_masked_adamw(method: type[Speft]) -> float:
    """Largest gap between weights after eight steps of two micro-batches, clipped, and dense AdamW's with masks."""
    settings = {"batch_size": 4, "micro_batch_size": 2, "max_grad_norm": 0.02}
    own = attached(method_of(method, OPTIONS, lr=1e-2, **settings))
    model = llama()
    matrices, masks = matrices_of(model), chosen(attached(method_of(Speft, OPTIONS, **settings)))
    dense = AdamW(matrices, lr=1e-2)
    for step in range(8):
        own.begin_step(step)
        for last in (False, True):
            rows = batch(2 * step + last)
            own.backward(own.model(**rows).loss / 2, last=last)
            (model(**rows).loss / 2).backward()
        facts = own.end_step(lambda: iter(()))
        for weight, mask in zip(matrices, masks, strict=True):
            weight.grad *= mask
        norm = float(nn.utils.clip_grad_norm_(matrices, 0.02))
        assert facts.grad_norm == pytest.approx(norm, rel=0.5)
        assert facts.clipped
        dense.step()
        model.zero_grad()
    return gap(own.model, model)


def test_steps_equal_dense_adamw_with_masked_gradients() -> None:
    """Paper, section 3: AdamW on the sparse deltas. Clipping bites at every step; two micro-batches add up."""
    assert beside_masked_adamw(Speft) < 1e-6


class AbsoluteBeforeTheAverage(Speft):
    def _mean_gradients(self, matrices: Any, calibration: Any) -> list[Tensor]:
        self.options = self.options.model_copy(update={"salience": "fisher"})
        return [square.sqrt() for square in super()._mean_gradients(matrices, calibration)]


class KeepsTheLastMicroBatchOnly(Speft):
    def _gather(self, parameter: Any) -> None:
        if self._gathering:
            self._gradients.pop(parameter, None)
        super()._gather(parameter)


def test_defect_is_caught_absolute_value_before_the_average(record_property: Callable[[str, object], None]) -> None:
    record_property("defect", "Speft: AbsoluteBeforeTheAverage")
    record_property("caught_by", "gradients are averaged before their absolute value is taken")
    assert in_the_second(AbsoluteBeforeTheAverage) < 1.0


def test_defect_is_caught_lost_micro_batch(record_property: Callable[[str, object], None]) -> None:
    apart = beside_masked_adamw(KeepsTheLastMicroBatchOnly)
    record_property("defect", "Speft: KeepsTheLastMicroBatchOnly")
    record_property("caught_by", f"steps equal dense AdamW with masked gradients: {apart:.1e} apart")
    assert apart > 1e-4


def test_defect_is_caught_best_of_each_matrix(
    monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    class LocalBest(Best):
        def offer(self, scores: Tensor, first: int) -> None:
            own = scores.topk(100 // 28).indices + first
            self.places = torch.cat([self.places, own]) if hasattr(self, "places") else own

    monkeypatch.setattr(speft, "Best", LocalBest)
    record_property("defect", "Speft: best of each matrix")
    record_property("caught_by", "entries of the second matrix alone have the largest gradient")
    assert in_the_second(Speft) < 1.0


def test_one_dense_gradient_at_a_time_is_alive() -> None:
    """While scores are taken and in training; what is kept between passes is one layer's sums, later k entries."""
    model = llama()
    most = 0

    def seen(parameter: Tensor) -> None:
        nonlocal most
        most = max(most, sum(p.grad is not None for p in model.parameters()))

    for weight in matrices_of(model):
        weight.register_post_accumulate_grad_hook(seen)
    method = attached(method_of(Speft, OPTIONS), model)
    run(method, 0, 2)
    assert most == 1
    assert all(p.grad is None for p in model.parameters())


def test_a_backward_pass_that_is_not_the_methods_gathers_nothing() -> None:
    """The harness's observer runs backward too."""
    method = attached(method_of(Speft, OPTIONS))
    method.model(**batch(0)).loss.backward()
    assert method._gradients == {}
    assert any(p.grad is not None for p in method.model.parameters())


def test_the_mask_survives_a_resume() -> None:
    straight, before = attached(method_of(Speft, OPTIONS)), attached(method_of(Speft, OPTIONS))
    run(straight, 0, 8), run(before, 0, 5)
    after = method_of(Speft, OPTIONS)
    after.attach(before.model)
    after.load_state_dict(before.state_dict())
    run(after, 5, 8)
    assert same(weights(straight.model), weights(after.model))


def test_sizes_that_make_no_sense_are_refused() -> None:
    from harness.step.facts import facts_of

    for options in ({}, {"k": 5, "density": 0.1}):
        with pytest.raises(ValueError, match="give one of k and density"):
            Speft.Config.model_validate(options)
    model = llama()
    linear, layers = sum(p.numel() for p in matrices_of(model)), sum(facts_of(model).layer_parameters)
    assert "is above" in (method_of(Speft, {"k": layers + 1}).skip(facts_of(model)) or "")
    with pytest.raises(ValueError, match="is above the"):
        method_of(Speft, {"k": linear + 1}).attach(model)
