"""LoRA, rsLoRA, PiSSA and LoRA+ against their definitions, and against peft driven by a plain loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from grass_tiny import llama, same, weights
from hand_driven import LR, Driven, assert_caught, exported, peft_by_hand, recipe
from harness.step.facts import facts_of
from torch import Tensor

from baselines.lora import Lora

OPTIONS: dict[str, Any] = {"rank": 4, "alpha": 8}


def factors(driven: Driven) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By the weight's name in the untouched model: its own part in the module, A and B, all float64."""
    found = {}
    for name, module in driven.module.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            parts = (module.get_base_layer().weight, module.lora_A["default"].weight, module.lora_B["default"].weight)
            own, a, b = (part.detach().double().clone() for part in parts)
            found[f"{name}.weight"] = (own, a, b)
    return found


# ---------------------------------------------------------------- LoRA and rsLoRA


def scale_differs(method_class: type[Lora], folder: Path, *, rslora: bool, init: str = "zero") -> str | None:
    """The first exported weight that is not its own part plus scale * B A, in float64."""
    driven = Driven(method_class, {**OPTIONS, "rslora": rslora, "init": init})
    driven.run(0, 5)
    scale = 8 / math.sqrt(4) if rslora else 8 / 4
    expected = {name: own + scale * b @ a for name, (own, a, b) in factors(driven).items()}
    found = exported(driven, folder)
    wrong = [n for n, w in expected.items() if not torch.allclose(found[n].double(), w, rtol=0, atol=1e-6)]
    return f"{wrong[0]} is not W + {scale:g} B A" if wrong else None


@pytest.mark.parametrize("init", ["zero", "pissa"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_exported_weight_is_w_plus_scaled_b_a(rslora: bool, init: str, tmp_path: Path) -> None:
    """Hu et al. 2021 (arXiv 2106.09685), section 4.1: alpha / r; rsLoRA (arXiv 2312.03732): alpha / sqrt(r)."""
    assert scale_differs(Lora, tmp_path, rslora=rslora, init=init) is None


class IgnoresRankStabilisation(Lora):
    def __init__(self, options: Any, **given: Any) -> None:
        super().__init__(options.model_copy(update={"rslora": False}), **given)


class ExportsTheResidual(Lora):
    def export(self, path: Path) -> None:
        self.wrapped.unload().save_pretrained(path)


@pytest.mark.parametrize("broken", [IgnoresRankStabilisation, ExportsTheResidual])
def test_defect_is_caught_by_the_exported_weights(
    broken: type[Lora], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    assert_caught(broken, scale_differs(broken, tmp_path, rslora=True, init="pissa"), record_property)


def test_a_target_that_the_model_has_not_is_a_reason_to_skip_and_not_silently_left_out() -> None:
    """Peft refuses only where none of the targets is found."""
    facts = facts_of(llama())

    def reason(*targets: str) -> str | None:
        options = Lora.Config.model_validate({**OPTIONS, "targets": targets})
        return Lora(options, recipe=recipe(), lr=LR, seed=0).skip(facts)

    assert reason("q_proj", "mlp.down_proj") is None
    assert reason("q_proj", "c_attn", "fc_in") == "targets: the model has no module named c_attn, fc_in"


# ---------------------------------------------------------------- PiSSA


def test_pissa_starts_with_the_largest_singular_directions_in_the_factors_and_the_rest_in_the_weight() -> None:
    """Meng et al. 2024 (arXiv 2404.02948), in LoRA's letters: A = S^1/2 V^T, B = U S^1/2, and W - B A stays behind.

    peft divides the factors by the scale's square root, so that scale * B A is what the paper calls B A.
    """
    untouched = weights(llama())
    driven = Driven(Lora, {**OPTIONS, "init": "pissa"})
    for name, (residual, a, b) in factors(driven).items():
        u, s, vt = np.linalg.svd(untouched[name].double().numpy(), full_matrices=False)
        principal = torch.from_numpy(u[:, :4] * s[:4] @ vt[:4])
        assert torch.allclose(2 * b @ a, principal, atol=1e-6)
        assert torch.allclose(residual, untouched[name].double() - principal, atol=1e-6)
        # both factors carry half of each singular value
        assert torch.allclose((2**0.5 * a).norm(dim=1), torch.from_numpy(s[:4] ** 0.5), atol=1e-5)
        assert torch.allclose((2**0.5 * b).norm(dim=0), torch.from_numpy(s[:4] ** 0.5), atol=1e-5)


def test_pissa_makes_the_same_residual_weights_at_every_attach_whatever_the_seed() -> None:
    """The residual is in no resume state (peft, tuners/lora/layer.py, pissa_init: a decomposition without chance)."""
    one, other = (Driven(Lora, {**OPTIONS, "init": "pissa"}, seed=seed) for seed in (3, 4))
    assert same(weights(one.model), weights(other.model))
    name, (residual, _, _) = next(iter(factors(one).items()))
    assert not torch.equal(residual, weights(llama())[name].double())


# ---------------------------------------------------------------- peft, driven by hand


def test_fifty_steps_are_those_of_peft_and_torchs_adamw_to_the_last_bit() -> None:
    """microsoft/LoRA through peft: the method adds nothing but the optimizer, and that is torch's AdamW."""
    driven = Driven(Lora, OPTIONS, max_grad_norm=0.05, weight_decay=0.01)
    driven.run(0, 50)

    def adamw(module: Any) -> torch.optim.Optimizer:
        trained = [p for p in module.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=LR, weight_decay=0.01, fused=True)

    assert same(weights(driven.module), peft_by_hand(adamw, clip=0.05, steps=50))


def lora_plus_differs(method_class: type[Lora]) -> str | None:
    """Names of weights that differ after 50 steps from those of peft's own LoRA+ optimizer, over torch's AdamW."""
    from peft.optimizers import create_loraplus_optimizer

    driven = Driven(method_class, {**OPTIONS, "lr_ratio": 16.0})
    driven.run(0, 50)

    def plus(module: Any) -> torch.optim.Optimizer:
        return create_loraplus_optimizer(
            module, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=16.0, weight_decay=0.0, fused=True
        )

    by_hand = peft_by_hand(plus, clip=None, steps=50)
    ours = weights(driven.module)
    wrong = [name for name in ours if not torch.equal(ours[name], by_hand[name])]
    return f"{wrong[0]} is not peft's" if wrong else None


def test_lora_plus_is_pefts_own_optimizer_to_the_last_bit() -> None:
    """Hayou et al. 2024 (arXiv 2402.12354); peft, optimizers/loraplus.py. No decay, no clipping."""
    assert lora_plus_differs(Lora) is None


class TurnsTheRatioAround(Lora):
    def _groups(self, adapters: Any) -> Any:
        slow, fast = super()._groups(adapters)
        return [{**slow, "lr": fast["lr"]}, {**fast, "lr": self.lr}]


class TrainsAllFactorsAtOneRate(Lora):
    def _groups(self, adapters: Any) -> Any:
        return list(adapters.values())


@pytest.mark.parametrize("broken", [TurnsTheRatioAround, TrainsAllFactorsAtOneRate])
def test_defect_is_caught_by_pefts_optimizer(
    broken: type[Lora], record_property: Callable[[str, object], None]
) -> None:
    assert_caught(broken, lora_plus_differs(broken), record_property)
