"""The observer probe measures what is true, needs less memory than a step, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grass_tiny import batch, llama
from harness.step.loss import label_tokens, token_loss
from harness.step.observer import Observer
from torch import Tensor, nn

from grass.layers import find_layers


def batches(count: int = 3) -> list[dict[str, Tensor]]:
    made = []
    for number in range(count):
        rows = batch(number)
        labels = rows["labels"].clone()
        labels[:, : number + 1] = -100
        made.append({**rows, "labels": labels, "attention_mask": torch.ones_like(labels)})
    return made


def by_hand(model: Any, given: list[dict[str, Tensor]]) -> tuple[list[float], float]:
    """Mean over batches of the root mean square of the entries of each layer's gradient."""
    model.eval()
    found, nats = [], 0.0
    for one in given:
        model.zero_grad()
        loss = token_loss(model, one)
        nats += float(loss.detach())
        (loss / label_tokens(one)).backward()
        layers = [torch.cat([p.grad.flatten() for p in layer.parameters()]) for layer in model.model.layers]
        found.append([float(g.double().square().mean().sqrt()) for g in layers])
    return [sum(column) / len(given) for column in zip(*found, strict=True)], nats / sum(map(label_tokens, given))


def capped() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(
        Gemma2Config(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=8)
    )  # fmt: skip


@pytest.mark.parametrize("make", [llama, lambda: llama(tied=True), capped], ids=["llama", "tied", "capped"])
def test_it_is_the_mean_over_batches_of_each_batchs_root_mean_square(make: Any) -> None:
    rms, loss = Observer(find_layers(model := make())).observe(model, batches())
    true_rms, true_loss = by_hand(model, batches())
    assert rms == pytest.approx(true_rms, rel=1e-5)
    assert loss == pytest.approx(true_loss, rel=1e-6)


def test_it_leaves_no_trace() -> None:
    model = llama().train()
    model.model.layers[2].requires_grad_(False)
    kept = torch.full_like(model.lm_head.weight, 2.0)
    model.lm_head.weight.grad = kept
    flags, generator = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    Observer(find_layers(model)).observe(model, batches())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.lm_head.weight.grad is kept
    assert sum(p.grad is not None for p in model.parameters()) == 1
    assert all("forward" not in vars(module) for module in model.modules())
    assert model.training
    assert torch.equal(torch.get_rng_state(), generator)


def test_at_most_one_gradient_is_alive_and_at_most_one_layers_activations() -> None:
    model = llama(layers=6)
    observer, alive = Observer(find_layers(model)), []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    largest: list[int] = []

    def kept(saved: list[int]) -> Any:
        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                saved[0] += tensor.numel()
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    for layers in (2, 6):
        small, saved = llama(layers=layers), [0]
        watched = small.model.norm.register_forward_hook(lambda *_, saved=saved: largest.append(saved[0]))
        with kept(saved):
            Observer(find_layers(small)).observe(small, batches(1))
        watched.remove()
    observer.observe(model, batches())
    assert alive, "the hooks saw nothing"
    assert max(alive) <= 1
    # up to the final norm the forward pass keeps each layer's input and nothing of what is inside it
    assert largest[-1] - largest[1] <= 4 * (2 * 8 * 16)
