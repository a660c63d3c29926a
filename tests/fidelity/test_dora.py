"""DoRA against its definition in float64, and against peft driven by a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from grass_tiny import batch, llama, same, weights
from hand_driven import LR, Driven, assert_caught, exported, peft_by_hand
from torch import Tensor, nn

from baselines.dora import Dora

OPTIONS: dict[str, Any] = {"rank": 4, "alpha": 8}


def adapted(driven: Driven) -> dict[str, Any]:
    """Peft's layers that carry factors, by the weight's name in the untouched model."""
    modules = driven.module.base_model.model.named_modules()
    return {f"{name}.weight": module for name, module in modules if hasattr(module, "lora_A")}


def magnitude(module: Any) -> Tensor:
    """M of a layer, shape (d_out,), float64."""
    found: Tensor = module.lora_magnitude_vector["default"].weight.detach().double()
    return found


def merge_differs(method_class: type[Dora], folder: Path) -> str | None:
    """The first exported weight that is not m (W0 + s B A) / norm by rows, in float64, after 5 steps."""
    driven = Driven(method_class, OPTIONS)
    before = weights(llama())
    driven.run(0, 5)
    expected = {}
    for name, module in adapted(driven).items():
        if not module.lora_magnitude_vector:
            return f"{name} has no magnitude"
        a, b = (part["default"].weight.detach().double() for part in (module.lora_A, module.lora_B))
        directed = before[name].double() + 8 / 4 * b @ a
        expected[name] = magnitude(module)[:, None] * directed / directed.square().sum(dim=1, keepdim=True).sqrt()
    found = exported(driven, folder)
    wrong = [n for n, w in expected.items() if not torch.allclose(found[n].double(), w, rtol=0, atol=1e-6)]
    return f"{wrong[0]} is not m (W0 + s B A) / norm" if wrong else None


def start_differs(method_class: type[Dora]) -> str | None:
    """The first magnitude that is not the norm of the rows of the loaded W0, or that does not train."""
    untouched = weights(llama())
    for name, module in adapted(Driven(method_class, OPTIONS)).items():
        norm = untouched[name].double().square().sum(dim=1).sqrt()
        if not torch.allclose(magnitude(module), norm, rtol=1e-6, atol=0):
            return f"m of {name} is not the norm of the rows of W0"
    return None


def test_the_exported_weight_is_the_magnitude_times_the_normalised_direction(tmp_path: Path) -> None:
    """Liu et al. 2024 (arXiv 2402.09353), equation 5, with the norm over each output row (peft: dim=1)."""
    assert merge_differs(Dora, tmp_path) is None


def test_the_magnitude_starts_as_the_row_norm_of_the_weights_that_were_loaded() -> None:
    """The same, section 4.1. mlx-examples, pull request 832: a port took the norm from another, random layer."""
    assert start_differs(Dora) is None


def test_the_untrained_model_is_the_loaded_one_and_with_bf16_weights_nearly_so() -> None:
    """peft, tuners/lora/dora.py, update_layer: the first norm is taken in the weights' dtype."""
    plain, wrapped = llama(), Driven(Dora, OPTIONS)
    assert torch.equal(plain(**batch(0)).logits, wrapped.module(**batch(0)).logits)
    driven = Driven(Dora, OPTIONS, model=llama(dtype=torch.bfloat16))
    gaps = []
    for module in adapted(driven).values():
        norm = module.get_base_layer().weight.double().square().sum(dim=1).sqrt()
        gaps.append(float((magnitude(module) / norm - 1).abs().max()))
    assert 1e-4 < max(gaps) < 1 / 256


def test_magnitudes_count_as_trainable_parameters_one_for_every_output_row() -> None:
    """Equation 5: m has one entry an output row."""
    driven = Driven(Dora, OPTIONS)
    modules = adapted(driven).values()
    factors = sum(p.numel() for m in modules for part in (m.lora_A, m.lora_B) for p in part.parameters())
    rows = sum(m.get_base_layer().weight.shape[0] for m in modules)
    assert driven.method.trainable_parameters == factors + rows


def test_fifty_steps_are_those_of_peft_and_torchs_adamw_to_the_last_bit() -> None:
    """NVlabs/DoRA through peft: the method adds nothing but the optimizer, and that is torch's AdamW."""
    driven = Driven(Dora, OPTIONS, max_grad_norm=0.05, weight_decay=0.01)
    driven.run(0, 50)

    def adamw(module: nn.Module) -> torch.optim.Optimizer:
        trained = [p for p in module.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=LR, weight_decay=0.01, fused=True)

    assert same(weights(driven.module), peft_by_hand(adamw, clip=0.05, steps=50, use_dora=True))


class IsPlainLora(Dora):
    PEFT_OPTIONS = {}  # noqa: RUF012


class TakesTheNormOfARandomLayer(Dora):
    def attach(self, model: nn.Module) -> nn.Module:
        wrapped = super().attach(model)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in wrapped.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.data.copy_(torch.randn(len(parameter), 16, generator=generator).norm(dim=1))
        return wrapped


class MergesWithoutTheNorm(Dora):
    def export(self, path: Path) -> None:
        for module in self.wrapped.modules():
            if hasattr(module, "lora_A"):
                module.lora_variant.clear()
        super().export(path)


def test_defect_is_caught_by_the_first_magnitudes(record_property: Callable[[str, object], None]) -> None:
    assert_caught(TakesTheNormOfARandomLayer, start_differs(TakesTheNormOfARandomLayer), record_property)


@pytest.mark.parametrize("broken", [IsPlainLora, MergesWithoutTheNorm])
def test_defect_is_caught_by_the_exported_weights(
    broken: type[Dora], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    assert_caught(broken, merge_differs(broken, tmp_path), record_property)
