"""OWS's outlier scores, its draws and its stale projections, by independent arithmetic."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from driving import Calibration, attached, method_of, run
from grass_tiny import batch, llama, same, weights
from torch import Tensor, nn

from baselines.matrices import linears_of
from baselines.ows import Ows, outlier_share, squared_feature_norms

OPTIONS = {"active_layers": 2, "sample_every": 3, "outlier_factor": 3.0, "calibration_rows": 4}


def test_an_entry_is_an_outlier_if_its_score_exceeds_m_times_the_mean_of_the_whole_layer() -> None:
    """Worked example; luuyin/OWL, lib/prune_all.py: scores of all matrices are put together before the mean is taken.

    Scores of A are [[1, 2], [1, 20]], those of B [[4, 4]]; their mean is 32 / 6. At M = 2 only 20 exceeds 10.67: one
    of six entries. By means of single matrices (6 and 4) it would be one of four in A, and 20 > 2 * 6 alone as well,
    but at M = 3.5 the layer's mean has 20 > 18.67 as an outlier where A's own has 20 < 21.
    """
    a = (torch.tensor([[1.0, -1.0], [-1.0, 10.0]]), torch.tensor([1.0, 2.0]))
    b = (torch.tensor([[8.0, -0.5]]), torch.tensor([0.5, 8.0]))
    assert float(outlier_share([a, b], 2.0)) == pytest.approx(1 / 6)
    assert float(outlier_share([a, b], 3.5)) == pytest.approx(1 / 6)
    assert float(outlier_share([a, b], 3.8)) == 0.0
    assert float(outlier_share([a], 3.5)) == 0.0


def by_hand(model: Any, factor: float) -> list[float]:
    """D of a Llama, in float64, from hidden states that were kept whole."""
    kept: dict[str, list[Tensor]] = {}
    handles = [
        module.register_forward_hook(
            lambda m, inputs, output, name=name: kept.setdefault(name, []).append(inputs[0].double())
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    ]
    with torch.no_grad():
        for number in range(2):
            model(**batch(1000 + number))
    for handle in handles:
        handle.remove()
    shares = []
    for layer in range(4):
        scores = [
            model.get_submodule(name).weight.detach().double().abs() * torch.cat(x).flatten(0, 1).norm(dim=0)
            for name, x in kept.items()
            if f".layers.{layer}." in name
        ]
        everything = torch.cat([s.flatten() for s in scores])
        shares.append(float((everything > factor * everything.mean()).double().mean()))
    return shares


def test_d_of_a_model_is_that_of_hidden_states_kept_whole() -> None:
    """Paper, section 3.2, after OWL (arXiv 2310.05175), equation 1: A_ij = ||X_j||_2 |W_ij|."""
    model = llama()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, :3] = 2.0  # so that D differs between layers
    method = attached(method_of(Ows, OPTIONS), model)
    expected = by_hand(model, 3.0)
    assert method.outlier_share == pytest.approx(expected)
    assert len(set(expected)) > 1
    assert method.probability == pytest.approx([d / math.fsum(expected) for d in expected])


def test_gpt2s_transposed_weights_have_the_scores_of_the_same_linears() -> None:
    """`Conv1D` computes x W + b with W of shape (inputs, outputs), `nn.Linear` x W^T + b."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=4, n_head=2, n_positions=16))
    with torch.no_grad():
        # a large *input* feature of the second matrix of the feed-forward block, in every layer
        model.transformer.h[1].mlp.c_proj.weight[5] = 3.0
    method = attached(method_of(Ows, OPTIONS), model)
    linears = linears_of(model)
    squares = squared_feature_norms(model, linears, Calibration(), 2)
    name = "transformer.h.1.mlp.c_proj.weight"
    assert squares[name].shape == (64,)
    weights_of: dict[str, Any] = {name: module.weight.detach() for name, module in linears[1].items()}
    scores = torch.cat([(w * squares[name].sqrt().unsqueeze(1)).abs().flatten() for name, w in weights_of.items()])
    assert method.outlier_share[1] == pytest.approx(float((scores > 3 * scores.mean()).double().mean()))


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = llama()
    before = weights(model)
    attached(method_of(Ows, OPTIONS), model)
    assert same(before, weights(model))
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_padding_does_not_count() -> None:
    """Ours: OWL's calibration rows have no padding, so a padded row must score as it does without."""

    class Padded(Calibration):
        def batches(self, count: int) -> Any:
            for rows in super().batches(count):
                wider = {key: nn.functional.pad(value, (0, 4)) for key, value in rows.items()}
                yield {**wider, "labels": nn.functional.pad(rows["labels"], (0, 4), value=-100)}

    model = llama().eval()
    plain = squared_feature_norms(model, linears_of(model), Calibration(), 2)
    padded = squared_feature_norms(model, linears_of(model), Padded(), 2)
    for name, squares in plain.items():
        torch.testing.assert_close(padded[name], squares, rtol=1e-4, atol=1e-6)


def drawn(method: type[Ows], draws: int) -> list[int]:
    """How often each of four layers is in the set, one layer a draw, D being 4 : 3 : 2 : 1."""
    found = method_of(method, {**OPTIONS, "active_layers": 1, "sample_every": 1})
    found.attach(llama())
    found.outlier_share = (0.4, 0.3, 0.2, 0.1)
    counts = [0] * 4
    for step in range(draws):
        found.begin_step(step)
        counts[found.active[0]] += 1
    return counts


def improbable(counts: list[int]) -> float:
    """Chi-square of the counts against 4 : 3 : 2 : 1; three degrees of freedom, above 30 one part in a million."""
    expected = [sum(counts) * p for p in (0.4, 0.3, 0.2, 0.1)]
    return sum((n - e) ** 2 / e for n, e in zip(counts, expected, strict=True))


def test_layers_are_drawn_linearly_in_d() -> None:
    """Paper, algorithm 1: p_l = D_l / sum D, no softmax."""
    assert improbable(drawn(Ows, 600)) < 30


class Uniform(Ows):
    @property
    def probability(self) -> tuple[float, ...]:
        return (0.25,) * 4


class Softmax(Ows):
    @property
    def probability(self) -> tuple[float, ...]:
        return tuple(torch.tensor(self.outlier_share).softmax(0).tolist())


@pytest.mark.parametrize("broken", [Uniform, Softmax])
def test_defect_is_caught(broken: type[Ows], record_property: Callable[[str, object], None]) -> None:
    chi_square = improbable(drawn(broken, 600))
    record_property("defect", f"Ows: {broken.__name__}")
    record_property("caught_by", f"layers are drawn linearly in D: chi-square {chi_square:.0f}")
    assert chi_square > 30


def test_without_any_outlier_draws_are_uniform_and_that_is_said() -> None:
    with pytest.warns(UserWarning, match="in 0 of 4 layers at outlier_factor 13, so layers are drawn uniformly"):
        method = attached(method_of(Ows, {**OPTIONS, "outlier_factor": 13.0}))
    assert method.probability == (0.25,) * 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attached(method_of(Ows, OPTIONS))


def test_outliers_in_no_more_layers_than_are_drawn_are_warned_about() -> None:
    model = llama()
    with torch.no_grad():
        model.model.layers[3].self_attn.q_proj.weight[0, 0] = 20.0
    with pytest.warns(UserWarning, match="in 1 of 4 layers .* the same layers train in every period"):
        method = attached(method_of(Ows, {**OPTIONS, "outlier_factor": 13.0}), model)
    assert method.probability == (0, 0, 0, 1)
    method.begin_step(0)
    assert 3 in method.active
    assert len(method.active) == 2


def test_a_layer_that_wakes_goes_on_with_its_old_projection() -> None:
    """The authors' code: galore_torch projects anew by the matrix's own count, which stands still while it sleeps."""
    method = attached(method_of(Ows, {**OPTIONS, "projected": True, "rank": 2, "update_gap": 4, "sample_every": 3}))
    weight = method.model.model.layers[0].self_attn.q_proj.weight

    def visit(layers: tuple[int, ...], first: int) -> Tensor | None:
        method.outlier_share = tuple(1.0 * (layer in layers) for layer in range(4))
        run(method, first, first + 3)
        assert method.active == layers
        projection = method.optimizer.state[weight].get("projection")
        return None if projection is None else projection.clone()

    first, asleep = visit((0, 1), 0), visit((2, 3), 3)
    torch.testing.assert_close(asleep, first, rtol=0, atol=0)
    method.begin_step(6)
    method.outlier_share = (1.0, 1.0, 0.0, 0.0)
    run(method, 6, 7)  # its fourth step: no new projection yet
    torch.testing.assert_close(method.optimizer.state[weight]["projection"], first, rtol=0, atol=0)
    run(method, 7, 8)  # its fifth: the count came round
    assert not torch.equal(method.optimizer.state[weight]["projection"], first)
