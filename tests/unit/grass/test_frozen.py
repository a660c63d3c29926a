"""What the user froze stays frozen, what a Grass froze does not, and changes after construction are noticed."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from grass_tiny import batch, grass_of, llama, same, train, weights
from torch import nn

from grass import Grass, plot, read_history, write_history

SAMPLERS = ["importance", "uniform", "inverse", "topk", "fixed", "static", "age", "cyclic"]


def moved(before: dict[str, torch.Tensor], model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def in_groups(opt: Grass) -> set[int]:
    return {id(p) for group in opt.param_groups for p in group["params"]}


def part_frozen(**options: Any) -> Any:
    """Layer 0 and the embedding frozen, of layer 2 the norms."""
    model = llama(**options)
    for frozen in (model.model.layers[0], model.model.embed_tokens):
        frozen.requires_grad_(False)
    for norm in (model.model.layers[2].input_layernorm, model.model.layers[2].post_attention_layernorm):
        norm.requires_grad_(False)
    return model


def frozen_of(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


# ------------------------------------------------------------ frozen before


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("offload", ["resident", "move"])
def test_what_the_user_froze_is_in_no_group_and_never_moves(kind: Any, offload: Any) -> None:
    model = part_frozen(layers=5)
    frozen, before = frozen_of(model), weights(model)
    opt = grass_of(model, sampler=kind, offload=offload, sample_every=1, weight_decay=0.1)
    named = dict(model.named_parameters())
    assert in_groups(opt) == {id(p) for name, p in named.items() if name not in frozen}
    assert [group["name"] for group in opt.param_groups] == [
        "layer 1", "layer 2", "layer 3", "layer 4", "final_norm", "head",
    ]  # fmt: skip
    train(model, opt, 0, 12)
    assert not moved(before, model) & frozen
    assert all(0 not in record.active and len(record.active) == 2 for record in opt.history)
    assert all(record.probability[0] == 0 for record in opt.history)
    assert frozen <= frozen_of(model)
    if kind in ("uniform", "age", "cyclic"):
        assert moved(before, model) == set(named) - frozen
    assert sum(opt.probability) == pytest.approx(1)
    assert not any(p in opt.state for name, p in named.items() if name in frozen)


def test_a_frozen_layer_is_not_measured_and_a_part_frozen_one_counts_what_trains(tmp_path: Path) -> None:
    model = part_frozen()
    opt = Grass(model, lr=1e-2, active_layers=1, sample_every=2)
    opt.probe([batch(0)])
    reference = llama()
    reference(**batch(0)).loss.backward()
    own = [
        p.grad.flatten()
        for name, p in reference.model.layers[2].named_parameters()
        if "layernorm" not in name and p.grad is not None
    ]
    assert opt.importance is not None
    assert opt.importance.values[2] == pytest.approx(float(torch.cat(own).square().mean().sqrt()), rel=1e-5)
    assert opt.importance.values[0] != opt.importance.values[0]  # nan
    assert opt.effective_layers <= 3
    train(model, opt, 0, 5)
    write_history(opt.history, tmp_path / "history.jsonl")
    records = read_history(tmp_path / "history.jsonl")
    assert records == list(opt.history)
    assert all(r.importance is not None and r.importance[0] is None and r.norm[0] is None for r in records)
    assert plot(records).axes


def test_in_step_and_exact_probing_leave_frozen_layers_out_too() -> None:
    frozen = frozen_of(part_frozen())
    model = part_frozen()
    before = weights(model)
    opt = Grass(model, lr=1e-2, active_layers=2, sample_every=3, probe_steps=2)
    train(model, opt, 0, 9)
    assert not moved(before, model) & frozen
    assert [r.norm[0] for r in opt.history] == [None] * 9
    assert all(r.norm[3] is not None for r in opt.history[:2])

    exact = Grass(part_frozen(), lr=1e-2, active_layers=2, accumulation_steps=2)
    exact.probe([batch(0), batch(1)], exact=True)
    assert exact.importance is not None
    assert exact.importance.measured()[0] is None
    assert all(exact.importance.values[1:])


def test_the_layers_above_train_as_if_the_frozen_one_were_not_there() -> None:
    """With layer 0 frozen, the draws are those of a model of three layers, by the same seed."""
    model = llama()
    model.model.layers[0].requires_grad_(False)
    opt = Grass(model, lr=1e-2, active_layers=1, sample_every=1, sampler="uniform", seed=3)
    smaller = Grass(llama(layers=3), lr=1e-2, active_layers=1, sample_every=1, sampler="uniform", seed=3)
    for step in range(20):
        assert opt.active == tuple(layer + 1 for layer in smaller.active)
        train(model, opt, step, step + 1)
        train(smaller.model, smaller, step, step + 1)


def test_nothing_to_draw_and_too_few_layers_are_one_sentence() -> None:
    model = llama()
    model.model.layers.requires_grad_(False)
    with pytest.raises(ValueError, match=r"every decoder layer is frozen .* requires_grad_"):
        Grass(model, lr=1e-2)
    model.model.layers[1].requires_grad_(True)
    with pytest.raises(ValueError, match=r"must be from 1 to 1 \(the model's 4 layers, less 3 frozen ones\), not 2"):
        Grass(model, lr=1e-2, active_layers=2)
    opt = Grass(model, lr=1e-2, active_layers=1, sampler="uniform")
    assert opt.active == (1,)


def test_a_resumed_run_with_frozen_parts_ends_as_if_nothing_had_happened(tmp_path: Path) -> None:
    straight = part_frozen()
    opt = grass_of(straight)
    train(straight, opt, 0, 11)

    first = part_frozen()
    before = grass_of(first)
    train(first, before, 0, 5)
    torch.save({"model": first.state_dict(), "opt": before.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    second = part_frozen()
    after = Grass(second, lr=1e-2, active_layers=2, sample_every=3, seed=9)
    second.load_state_dict(saved["model"])
    after.load_state_dict(saved["opt"])
    train(second, after, 5, 11)
    assert same(weights(second), weights(straight))
    assert (after.active, after.probability) == (opt.active, opt.probability)

    thawed = Grass(llama(), lr=1e-2, active_layers=2, sample_every=3)
    said = "other parts left out (trained in it alone: none; here alone: embedding, layer 0): freeze the same parts"
    with pytest.raises(ValueError) as caught:
        thawed.load_state_dict(saved["opt"])
    assert said in str(caught.value)


# ------------------------------------------------------------ a second optimizer


@pytest.mark.parametrize("how", ["alive", "deleted", "in-step probing", "embedding left out", "copied", "pickled"])
def test_a_second_optimizer_does_not_take_sleeping_layers_for_frozen_ones(how: str) -> None:
    model = llama()
    model.model.layers[0].requires_grad_(False)
    frozen = frozen_of(model)
    options: dict[str, Any] = {"train_embedding": False} if how == "embedding left out" else {}
    first = Grass(model, lr=1e-2, active_layers=1, sample_every=1, sampler="uniform", **options)
    if how == "in-step probing":
        first = Grass(model, lr=1e-2, active_layers=1, probe_steps=5)
    train(model, first, 0, 3)
    if how == "deleted":
        del first
    if how == "copied":
        model = copy.deepcopy(model)
    if how == "pickled":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
    second = Grass(model, lr=1e-2, active_layers=1, sample_every=1, sampler="cyclic")
    named = dict(model.named_parameters())
    assert in_groups(second) == {id(p) for name, p in named.items() if name not in frozen}
    before = weights(model)
    train(model, second, 3, 9)
    assert moved(before, model) == set(named) - frozen


def test_flags_set_after_an_earlier_optimizer_are_the_users() -> None:
    model = llama()
    first = Grass(model, lr=1e-2, active_layers=2, sampler="uniform", seed=1)
    asleep = next(layer for layer in range(4) if layer not in first.active)
    active = first.active[0]
    # frozen while it trained: nobody but the user can have done that
    model.model.layers[active].requires_grad_(False)
    assert Grass(model, lr=1e-2, active_layers=1, sampler="uniform").layer_parameters[active] == []
    # thawed all, then frozen one that had slept
    model.requires_grad_(True)
    model.model.layers[asleep].requires_grad_(False)
    last = Grass(model, lr=1e-2, active_layers=1, sampler="uniform")
    assert [bool(own) for own in last.layer_parameters] == [layer != asleep for layer in range(4)]


# ------------------------------------------------------------ changed after construction


def grown(model: Any) -> None:
    model.resize_token_embeddings(40)


def assigned(model: Any) -> None:
    model.load_state_dict(llama().state_dict(), assign=True)


CHANGES: dict[str, tuple[Any, str]] = {
    "frozen": (lambda model: model.requires_grad_(False), "was frozen"),
    "thawed": (lambda model: model.requires_grad_(True), "was made trainable"),
    "cast": (lambda model: model.to(torch.bfloat16), "was cast from torch.float32 to torch.bfloat16"),
    "resized in place": (
        lambda model: setattr(model.lm_head.weight, "data", torch.zeros(40, 16)),
        r"lm_head\.weight went from shape \(32, 16\) to \(40, 16\)",
    ),
    "resized": (grown, r"embed_tokens.weight went from shape \(32, 16\) to \(40, 16\)"),
    "assigned": (assigned, "was replaced by another tensor"),
    "adapters": (
        lambda model: model.register_parameter("extra", nn.Parameter(torch.zeros(2))),
        "the parameter extra was added",
    ),
    "removed": (lambda model: delattr(model, "lm_head"), r"lm_head\.weight was removed"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("how", ["probe", "step", "in-step probing"])
def test_a_change_after_construction_is_noticed_before_anything_moves(change: str, how: str) -> None:
    model = llama()
    options: dict[str, Any] = {"probe": {}, "step": {"sampler": "uniform"}, "in-step probing": {"probe_steps": 2}}[how]
    opt = Grass(model, lr=1e-2, active_layers=2, sample_every=1, **options)
    do, said = CHANGES[change]
    do(model)
    before = weights(model)
    call = (lambda: opt.probe([batch(0)])) if how == "probe" else opt.step
    with pytest.raises(RuntimeError, match=rf"{said} after Grass was built: prepare the model first \(load, resize"):
        call()
    assert same(before, weights(model))


def test_what_does_not_matter_is_not_noticed() -> None:
    model = llama()
    opt = grass_of(model)
    model.load_state_dict(llama().state_dict())
    model.register_parameter("scale", nn.Parameter(torch.zeros(2), requires_grad=False))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    train(model, opt, 0, 4)
    # from the first step on, flags are the caller's own affair
    model.model.embed_tokens.requires_grad_(False)
    train(model, opt, 4, 8)


def test_a_model_moved_after_its_state_was_loaded_is_noticed() -> None:
    opt = grass_of(llama(), sampler="uniform")
    train(opt.model, opt, 0, 1)
    assert opt.states.offload is not None
    opt.states.check_device(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="moved to cuda:0 after the optimizer's state was loaded for cpu: move the"):
        opt.states.check_device(torch.device("cuda:0"))
