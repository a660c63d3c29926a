"""The chunked loss is the plain loss to rounding, its gradients too, and says where it cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grass_tiny import batch, llama
from harness.step.loss import chunked_token_loss, token_loss
from torch import Tensor, nn
from torch.nn import functional as F

from grass import loss
from grass.loss import chunked_cross_entropy


def plain(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="sum")


@pytest.mark.parametrize("trains", ["hidden", "head", "both"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_loss_and_gradients_are_those_of_the_plain_loss(
    trains: str, with_bias: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK_ROWS", chunk)
    targets = torch.tensor([3, 10, -100, 0, 5, -100, 3])
    found = []
    for compute in (chunked_cross_entropy, plain):
        torch.manual_seed(0)
        hidden = torch.randn(7, 5, requires_grad=trains != "head")
        weight, bias = torch.randn(11, 5, requires_grad=trains != "hidden"), torch.randn(11)
        bias.requires_grad_(trains != "hidden")
        value = compute(hidden, weight, targets, bias if with_bias else None)
        (value / 5).backward()
        found.append([value.detach(), *(t.grad for t in (hidden, weight, bias) if t.grad is not None)])
    assert len(found[0]) == {"hidden": 2, "head": 2, "both": 3}[trains] + (with_bias and trains != "hidden")
    torch.testing.assert_close(found[0], found[1])


def test_a_bf16_loss_is_summed_in_fp32() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(600, 16).bfloat16(), torch.randn(50, 16).bfloat16()
    targets = torch.randint(50, (600,))
    value = chunked_cross_entropy(hidden, weight, targets)
    exact = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(exact), rel=2e-3)


def labelled(seed: int) -> dict[str, Tensor]:
    made = batch(seed)
    return {**made, "attention_mask": torch.ones_like(made["input_ids"])}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_has_the_same_loss_and_gradients_either_way(tied: bool, wrapped: bool) -> None:
    found = []
    for compute in (chunked_token_loss, token_loss):
        model: nn.Module = llama(tied=tied)
        if wrapped:
            from peft import LoraConfig, get_peft_model

            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
        value = compute(model, labelled(0))
        value.backward()
        found.append([value.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[0], found[1])


def test_a_model_that_caps_its_logits_is_refused() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    model: Any = Gemma2ForCausalLM(
        Gemma2Config(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=8)
    )  # fmt: skip
    with pytest.raises(ValueError, match="changes its logits after the head"):
        chunked_token_loss(model, labelled(0))
    token_loss(model, labelled(0)).backward()


def test_a_head_that_is_no_plain_linear_layer_is_refused() -> None:
    model = llama()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="not a Sequential"):
        chunked_token_loss(model, labelled(0))
