"""What a model's architecture allows: how its attention is computed, and how many positions it has.

Nothing here is decided by a list of model families: transformers' classes and the module tree are asked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from harness.step.outcomes import CannotRunError

_POSITIONS = re.compile(r"(^|\.)(wpe|\w*position\w*)$")
"""Names of modules and buffers that hold one row a position."""
_OTHER_TOWER = re.compile(r"vision|visual|image|img|audio|speech")
"""In the name of what a multimodal model has beside its text: its positions are not the text's."""


@dataclass(frozen=True)
class Attention:
    """How attention is computed."""

    kind: str
    """transformers' word: sdpa or eager."""
    why: str | None
    """Why it is not SDPA."""


def asked_attention(config: Any) -> str | None:
    """The `attn_implementation` to ask transformers for: None takes SDPA where the model's class has it, else eager.

    Eager is asked for where the configuration caps the attention scores (Gemma 2's `attn_logit_softcapping`): SDPA
    leaves the cap out and says nothing, so the model would be another one than was pretrained.
    """
    return None if _cap(config) is None else "eager"


def attention_of(model: nn.Module) -> Attention:
    """How attention is computed in a model that was made with `asked_attention`."""
    config: Any = model.config
    kind = config._attn_implementation or "eager"
    if kind == "sdpa":
        return Attention(kind, None)
    cap = _cap(config)
    why = f"{type(model).__name__} has no SDPA" if cap is None else f"SDPA drops attn_logit_softcapping, {cap:g} here"
    return Attention(kind, why)


def _cap(config: Any) -> float | None:
    found: float | None = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return found


def positions_of(model: nn.Module) -> int | None:
    """Tokens that a row may have at most, where positions are a table; None where there is no table to run out of.

    A table is an embedding by position other than the token embedding, learned (GPT-2, OPT) or fixed (GPT-J, CTRL). Its
    first rows are left out where the class adds an offset (OPT) or starts behind the padding index (RoBERTa).
    Rotary angles and biases by distance are computed for any length, whatever `max_position_embeddings` says; MPT's
    biases are not.
    """
    getter: Any = model.get_input_embeddings
    tokens = getter()
    sizes = [
        module.num_embeddings - _unused_rows(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and module is not tokens and _of_text(name) and _POSITIONS.search(name)
    ]
    tables: list[Any] = [
        buffer for name, buffer in model.named_buffers() if _of_text(name) and name.endswith("embed_positions")
    ]
    tables += [getattr(module, "pos_encoding", None) for module in model.modules()]
    sizes += [len(table) for table in tables if isinstance(table, Tensor) and table.dim() == 2]
    config: Any = model.config
    if config.model_type == "mpt":
        sizes.append(config.max_seq_len)  # its biases are made anew in each forward pass, and no longer than this
    return min(sizes, default=None)


def _of_text(name: str) -> bool:
    return _OTHER_TOWER.search(name) is None


def _unused_rows(table: nn.Embedding) -> int:
    offset = getattr(table, "offset", None)
    if isinstance(offset, int):
        return offset
    return 0 if table.padding_idx is None else table.padding_idx + 1


def check_length(model: nn.Module, length: int, *, what: str) -> None:
    """Refuse rows of `length` tokens that the model has no positions for; `what` names the number in the message.

    Raises:
        CannotRunError: with both numbers.
    """
    positions = positions_of(model)
    if positions is not None and length > positions:
        raise CannotRunError(f"{what} is {length}, and {type(model).__name__} has {positions} positions: lower it")
