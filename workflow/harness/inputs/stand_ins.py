"""Small random models of a real model's architecture, with its own tokenizer, in its own files' layout."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from harness.errors import UserError, first_line
from harness.step.architecture import asked_attention
from harness.step.model_classes import AutoConfig, AutoModelForCausalLM

disable_progress_bar()

_WIDTH, _HEADS, _LAYERS = 64, 4, 6
_ROUND_TO = 8
_SCALED = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size", "ffn_dim")
_NOT_COPIED = ("config.json", "*.index.json")
_COPIED = ("*.json", "*.model", "*.txt", "*.jinja")


def write_stand_in(folder: Path, target: Path, *, seed: int = 0) -> int:
    """Write to `target` a model of the class and settings in `folder`/config.json with at most 6 layers of width 64.

    Kept: the class, whether the head is tied, the kind of each layer, the ratio of key-value heads, the vocabulary and
    the tokenizer's files. Weights are bf16, random, and do not depend on the process that makes them.

    Returns:
        Parameters of the model.

    Raises:
        UserError: the configuration cannot be read, or cannot be made small.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        _make_small(config.get_text_config())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(
                config, dtype=torch.bfloat16, attn_implementation=asked_attention(config)
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(
            f"{folder}: no small model of this config.json can be made ({first_line(error)}); give this model another "
            "one in the rehearsal, or leave it out there"
        ) from error
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    model.save_pretrained(target)
    left_out = {path.name for pattern in _NOT_COPIED for path in folder.glob(pattern)}
    for path in {path for pattern in _COPIED for path in folder.glob(pattern)}:
        if path.name not in left_out:
            shutil.copyfile(path, target / path.name)
    count: int = model.num_parameters()
    return count


def _make_small(config: Any) -> None:
    """Change a text model's configuration in place; transformers knows most sizes by one name in every class."""
    width, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    shorter, fewer = min(layers, _LAYERS), min(heads, _HEADS)
    head_dim = getattr(config, "head_dim", None)
    for name in _SCALED:
        if isinstance(value := getattr(config, name, None), int):
            setattr(config, name, _rounded(value * _WIDTH / width))
    if isinstance(head_dim, int):
        config.head_dim = _rounded(_WIDTH / fewer * head_dim * heads / width)
    if isinstance(groups := getattr(config, "num_key_value_heads", None), int):
        config.num_key_value_heads = max(1, fewer * groups // heads)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == layers:  # one entry a layer
            setattr(config, name, value[:shorter])
        elif name in ("word_embed_proj_dim", "embedding_size") and value == width:
            setattr(config, name, _WIDTH)
    config.hidden_size, config.num_attention_heads, config.num_hidden_layers = _WIDTH, fewer, shorter


def _rounded(value: float) -> int:
    return max(_ROUND_TO, round(value / _ROUND_TO) * _ROUND_TO)
