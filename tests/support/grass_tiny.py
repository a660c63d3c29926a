"""A tiny Llama, batches for it, and a plain training loop: what the tests of `grass` share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grass import Grass, LayerMap
from grass.layers import OUTSIDE


def llama(*, layers: int = 4, tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).to(dtype)


def batch(seed: int) -> dict[str, Tensor]:
    ids = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def grass_of(model: Any, **options: Any) -> Grass:
    chosen = {"lr": 1e-2, "active_layers": 2, "sample_every": 3, **options}
    opt = Grass(model, **chosen)
    if opt.needs_probe:
        opt.probe([batch(-1), batch(-2)])
    return opt


def train(model: Any, opt: Any, first: int, last: int) -> None:
    for step in range(first, last):
        model(**batch(step)).loss.backward()
        opt.step()
        opt.zero_grad()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def layer_weights(opt: Grass, layer: int) -> list[Tensor]:
    return [p.detach().clone() for p in opt.layer_parameters[layer]]


def assert_every_parameter_is_in_one_place(model: nn.Module, found: LayerMap) -> None:
    placed = [id(p) for parameters in found.layer_parameters() for p in parameters]
    placed += [id(p) for key in OUTSIDE for p in found.outside[key]]
    assert len(placed) == len(set(placed))
    assert set(placed) == {id(p) for p in model.parameters()}


def straight_and_resumed(stop: int, file: Path, *same_at_once: str, **options: Any) -> tuple[Grass, Grass]:
    """The optimizers of a run of 11 steps and of the same run killed after `stop` steps and resumed from its state.

    Both end with the same weights; the attributes `same_at_once` are the same right after loading too.
    """
    straight, first, second = llama(), llama(), llama()
    opt, before = grass_of(straight, **options), grass_of(first, **options)
    train(straight, opt, 0, 11)
    train(first, before, 0, stop)
    torch.save({"model": first.state_dict(), "opt": before.state_dict()}, file)
    # another seed and no probe: everything must come from the state
    after = Grass(second, lr=1e-2, sample_every=3, seed=99, **{"active_layers": 2, **options})
    saved = torch.load(file, weights_only=True)
    second.load_state_dict(saved["model"])
    after.load_state_dict(saved["opt"])
    for name in same_at_once:
        assert getattr(after, name) == getattr(before, name), name
    train(second, after, stop, 11)
    assert same(weights(second), weights(straight))
    return opt, after
