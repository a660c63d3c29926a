"""DoRA through peft: LoRA on the direction of each weight, and a magnitude of its own for every output row.

The paper (arXiv 2402.09353) and peft do the same; everything but the decomposition, options included, is LoRA's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from baselines.lora import Lora

if TYPE_CHECKING:
    from collections.abc import Mapping


class Dora(Lora):
    """Liu et al. 2024 (arXiv 2402.09353); W = m (W0 + (alpha / r) B A) / norm, the norm taken by output row.

    m starts as the norm of the rows of W0 and trains like the factors; backward treats the norm as a constant (the
    paper's section 4.3, and peft). With bf16 weights, peft computes the first norm in bf16 before it converts m to
    fp32, so that m is off by up to 1 part in 256 and the untrained model differs slightly from the loaded one.

    Dropout switches peft to a path with one more product with W0 per matrix: leave it at 0 when measuring speed.
    """

    PAPER = "arXiv 2402.09353"
    RANKS = False
    EXAMPLES: ClassVar[tuple[dict[str, Any], ...]] = (
        {"rank": 4, "alpha": 8},
        {"rank": 4, "alpha": 8, "dropout": 0.1, "targets": ("q_proj", "v_proj")},
        {"rank": 4, "alpha": 8, "adapter_dtype": "weights", "lr_ratio": 4.0},
    )
    PEFT_OPTIONS: ClassVar[Mapping[str, Any]] = {"use_dora": True}
