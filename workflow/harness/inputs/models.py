"""Loads models and tokenizers from a folder."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers.utils.logging import disable_progress_bar

from baselines.method import torch_dtype
from harness.errors import UserError, first_line
from harness.inputs.checkpoints import check_checkpoint, complaint, load_with_info, quiet
from harness.step.facts import unreached_as_buffers
from harness.step.model_classes import AutoConfig, AutoTokenizer, GenerationConfig

disable_progress_bar()  # transformers' bar for each loaded file would hide the harness's own progress


def load_model(path: Path, *, weight_dtype: Literal["fp32", "bf16"], **kwargs: Any) -> nn.Module:
    """A causal language model in training mode on the CPU (or where `kwargs` put it), every parameter requiring grad:
    constants that the architecture keeps as frozen parameters, and towers beside the text, become buffers.

    Attention is as `harness.step.architecture` asks for it, unless `kwargs` say otherwise; `kwargs` can also ask for
    quantised loading. Pass `use_cache=False` to the forward pass in training: the setting is not changed here, since it
    would be saved with the trained model. A generation configuration that transformers would refuse to save is replaced
    by a neutral one, see `generation_why`; scoring sets its own.

    Raises:
        UserError: the checkpoint does not hold the weights that its architecture has.
    """
    neutral = {} if generation_why(path) is None else {"generation_config": _neutral_generation(path)}
    try:
        model, info = load_with_info(path, dtype=torch_dtype(weight_dtype), **neutral, **kwargs)
    except RuntimeError:
        check_checkpoint(path, asked=str(path))  # says what does not fit, if anything
        raise
    if why := complaint(model, info):
        raise UserError(f"{path}: {why}")
    with torch.device("meta"):
        as_built = type(model)(model.config)
    return unreached_as_buffers(model, as_built=as_built).train()


def generation_why(path: Path) -> str | None:
    """Why a model cannot be saved with its own generation_config.json; None if it can, or has none."""
    try:
        with quiet():
            GenerationConfig.from_pretrained(path).validate(strict=True)
    except OSError:  # there is none, or it is not JSON: transformers makes one from config.json
        return None
    except (ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        return f"generation_config.json is refused by transformers, and replaced by a neutral one ({reason[:200]})"
    return None


def _neutral_generation(path: Path) -> GenerationConfig:
    config = AutoConfig.from_pretrained(path).get_text_config()
    ids = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return GenerationConfig(**ids)


def check_savable(model: nn.Module, tokenizer: Any, *, path: Path) -> None:
    """Save all but the weights once, so that what cannot be exported is noticed before it is trained.

    Args:
        model: as loaded.
        tokenizer: of the same folder.
        path: that folder, for the message.

    Raises:
        UserError: transformers refuses to save the model's configuration or its tokenizer.
    """
    untyped: Any = model
    with tempfile.TemporaryDirectory(prefix="harness-export-") as folder:
        try:
            untyped.save_pretrained(folder, state_dict={})
            tokenizer.save_pretrained(folder)
        except (ValueError, TypeError, AttributeError, KeyError, RuntimeError) as error:
            raise UserError(
                f"{path}: transformers cannot save this model again ({first_line(error)}); correct its config.json or "
                "its tokenizer's files"
            ) from error


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model folder, with a pad token that the model's embedding has.

    A tokenizer without such a pad token uses its unknown token (id 0 in Llama 1 and 2, which is the published
    protocol's choice), else its end token, else token 0. The choice does not affect the loss: padding is masked out by
    position.

    Raises UserError if there is no tokenizer, or its end token lies outside the embedding.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: transformers finds no tokenizer there ({first_line(error)}); copy it there"
        ) from error
    rows = _embedding_rows(path)
    end = tokenizer.eos_token_id
    if end is not None and rows is not None and end >= rows:
        raise UserError(
            f"{path}: the end token {tokenizer.eos_token!r} has id {end}, and the model's embedding has {rows} rows; "
            "take the tokenizer that belongs to the model, or a model whose embedding was resized"
        )
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, end, 0)
    pad = next(number for number in candidates if number is not None and (rows is None or number < rows))
    if pad != tokenizer.pad_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    return tokenizer


def _embedding_rows(path: Path) -> int | None:
    """Rows of the token embedding, by config.json; None where there is none, or it does not say."""
    try:
        config = AutoConfig.from_pretrained(path).get_text_config()
    except (OSError, ValueError, KeyError):
        return None
    rows: int | None = getattr(config, "vocab_size", None)
    return rows
