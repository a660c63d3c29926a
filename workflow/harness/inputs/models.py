"""Loads models and tokenizers from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from baselines.method import torch_dtype
from harness.errors import UserError, first_line
from harness.records.run import ModelRecord
from harness.study.paths import resolve

disable_progress_bar()  # transformers' bar for each loaded file would hide the harness's own progress


def model_folder(record: ModelRecord) -> Path:
    """Folder of a manifest's model on this machine; raises UserError if a `${NAME}` in its path is not set."""
    return resolve(record.folder)


def load_model(path: Path, *, weight_dtype: Literal["fp32", "bf16"], **kwargs: Any) -> nn.Module:
    """A causal language model in training mode on the CPU (or where `kwargs` put it), every parameter requiring grad.

    Attention is scaled-dot-product unless `kwargs` say otherwise; `kwargs` can also ask for quantised loading. Pass
    `use_cache=False` to the forward pass in training: the setting is not changed here, since it would be saved with the
    trained model.
    """
    settings = {"attn_implementation": "sdpa", "dtype": torch_dtype(weight_dtype), **kwargs}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, **settings)
    model.train()
    return model


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model folder, with a pad token.

    A tokenizer without a pad token uses its unknown token (id 0 in Llama 1 and 2, which is the published protocol's
    choice), else its end token. The choice does not affect the loss: padding is masked out by position.

    Raises UserError if it has none of the three, or if there is no tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: transformers finds no tokenizer there ({first_line(error)}); copy it there"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError(f"{path}: tokenizer without pad, unknown and end token; set pad_token in tokenizer_config.json")
    return tokenizer
