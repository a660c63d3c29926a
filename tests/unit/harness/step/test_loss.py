"""The chunked loss is the plain loss to rounding, its gradients too, and says where it cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from grass_tiny import batch, llama
from harness.step.loss import chunked_token_loss, label_tokens, logits_are_plain, row_losses, token_loss
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


def capped() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(
        Gemma2Config(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=8)
    )  # fmt: skip


def test_a_model_that_caps_its_logits_is_refused() -> None:
    model = capped()
    with pytest.raises(ValueError, match="changes its logits after the head"):
        chunked_token_loss(model, labelled(0))
    token_loss(model, labelled(0)).backward()


def test_a_head_that_is_no_plain_linear_layer_is_refused() -> None:
    model = llama()
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match="not a Sequential"):
        chunked_token_loss(model, labelled(0))


# ------------------------------------------------------------ autocast


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("compute", [chunked_token_loss, token_loss])
def test_autocast_multiplies_in_bf16_and_keeps_weights_gradients_and_loss_in_fp32(
    compute: Any, checkpointing: bool
) -> None:
    model = llama().train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    products: list[torch.dtype] = []
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda _m, _a, made: products.append(made.dtype))
    found = []
    for autocast in (False, True):
        model.zero_grad()
        value = compute(model, labelled(0), autocast=autocast)
        value.backward()
        assert value.dtype == torch.float32
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        found.append([value.detach(), *(p.grad for p in model.parameters())])
    assert set(products[: len(products) // 2]) == {torch.float32}
    # recomputed in backward, which is outside autocast: in bf16 all the same
    assert products[len(products) // 2 :] == [torch.bfloat16] * (2 if checkpointing else 1)
    assert float(found[0][0]) != float(found[1][0])
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=0)
    for exact, rounded in zip(*found, strict=True):
        assert float((exact - rounded).norm()) < 0.02 * float(exact.norm())


# ------------------------------------------------------------ losses of rows


def test_a_rows_loss_is_its_own_and_few_logits_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.step.loss.CHUNK_ROWS", 3)
    model, rows = llama(), labelled(0)
    labels = rows["labels"].clone()
    labels[0, :5] = -100
    rows = {**rows, "labels": labels}
    largest: list[int] = []
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *a, **k: _noted(linear(*a, **k), largest))
    with torch.no_grad():
        chunks, whole = row_losses(model, rows), row_losses(model, rows, in_chunks=False)
        alone = [float(token_loss(model, {k: v[n : n + 1] for k, v in rows.items()})) for n in (0, 1)]
    assert [tokens for _, tokens in chunks] == [3, 7]
    assert label_tokens(rows) == 10
    for found in (chunks, whole):
        assert [loss for loss, _ in found] == pytest.approx(alone, rel=1e-5)
    assert 3 in largest, "tokens that get logits at once"


def _noted(made: Tensor, largest: list[int]) -> Tensor:
    if made.shape[-1] == 32 and made.dim() == 2:
        largest.append(len(made))
    return made


def test_whether_logits_may_be_made_in_chunks_is_known_beforehand() -> None:
    assert logits_are_plain(llama(), labelled(0))
    assert not logits_are_plain(capped(), labelled(0))
    model = llama()
    model.lm_head = nn.Sequential(model.lm_head)
    assert not logits_are_plain(model, labelled(0))
