"""Models: pretrained here, found in a folder, or fetched from the hub; then loaded and measured out."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Literal

import torch
from httpx import HTTPError
from huggingface_hub import snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from baselines.method import torch_dtype
from harness.errors import UserError
from harness.inputs.pretrain import pretrain
from harness.records.atomic import sha256, write_json
from harness.records.code import FOUND_MODEL, PRETRAINED_MODEL
from harness.records.provenance import provenance
from harness.records.run import ModelRecord
from harness.study.paths import resolve
from harness.study.spec import HubModel, LocalModel, ModelJob

disable_progress_bar()  # the harness shows its own progress; a bar a loaded file would drown it

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def make_model(job: ModelJob, folder: Path) -> ModelRecord:
    """Make a model ready to load and write manifest.json into `folder`.

    Pretrained and fetched models lie in `folder`/model, a local one stays where it is and is only hashed. The manifest
    is written last: where it stands, the model is whole.

    Raises UserError, in one line, for a folder that holds no model and for a download that cannot be had.
    """
    started = time.perf_counter()
    source = job.source
    weights = folder / "model"
    losses: list[tuple[int, float]] = []
    if isinstance(source, LocalModel):
        origin = provenance(sources=FOUND_MODEL, inputs={})
        weights, where = resolve(source.path), source.path
    elif isinstance(source, HubModel):
        origin = provenance(sources=FOUND_MODEL, inputs={})
        _fetch(source, weights)
        where = os.path.relpath(weights)
    else:
        origin = provenance(sources=PRETRAINED_MODEL, inputs={})
        losses = pretrain(source, weights).losses
        where = os.path.relpath(weights)
    files = _checked_files(weights, asked=where)
    record = ModelRecord(
        name=job.name,
        folder=where,
        files_sha256={file.name: sha256(file) for file in files},
        parameters=_count_parameters(weights, asked=where),
        pretraining_loss=losses,
        wall_s=time.perf_counter() - started,
        provenance=origin,
    )
    write_json(folder / "manifest.json", record.model_dump(mode="json"))
    return record


def model_folder(record: ModelRecord) -> Path:
    """Where the model of a manifest lies on this machine; raises UserError where a `${NAME}` in it is not set."""
    return resolve(record.folder)


def load_model(path: Path, *, weight_dtype: Literal["fp32", "bf16"], **kwargs: Any) -> nn.Module:
    """A causal language model in training mode on the CPU (or where `kwargs` put it), every parameter requiring grad.

    Attention is scaled-dot-product unless `kwargs` say otherwise; quantised loading comes in through `kwargs` too. Pass
    `use_cache=False` to the forward pass in training: the setting is not touched here, since it would be saved with
    the trained model.
    """
    settings = {"attn_implementation": "sdpa", "dtype": torch_dtype(weight_dtype), **kwargs}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, **settings)
    model.train()
    return model


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a model folder, with a pad token.

    One without a pad token takes its unknown token (id 0 in Llama 1 and 2, which is the published protocol's choice),
    else its end token. Which one it is never matters to the loss: padding is masked out by position.

    Raises UserError where there is none of the three, or no tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: transformers finds no tokenizer there ({_first_line(error)}); copy it there"
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise UserError(f"{path}: tokenizer without pad, unknown and end token; set pad_token in tokenizer_config.json")
    return tokenizer


def _checked_files(folder: Path, *, asked: str) -> list[Path]:
    """The files that make up a model; raises UserError naming the first kind that is missing."""
    if not folder.is_dir():
        raise UserError(f"{asked}: no such folder; give the folder of a model in Hugging Face layout")
    if not (folder / "config.json").is_file():
        raise UserError(f"{asked}: no config.json in it; give the folder of a model in Hugging Face layout")
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise UserError(
            f"{asked}: no tokenizer in it (one of {', '.join(_TOKENIZERS)}); copy the model's tokenizer there"
        )
    weights = [file for pattern in _WEIGHTS for file in folder.glob(pattern)]
    if not weights:
        raise UserError(f"{asked}: no weights in it ({' or '.join(_WEIGHTS)}); download or convert them")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        # Offline, the hub client takes a folder with a broken download for whole; a copied folder may lack a shard too.
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{asked}: {index.name} has no readable weight_map; fetch it again") from error
        missing = sorted(name for name in shards if not (folder / name).is_file())
        if missing:
            raise UserError(
                f"{asked}: {len(missing)} of {len(shards)} shards missing, first {missing[0]}; fetch them again"
            )
    texts = [file for pattern in ("*.json", "*.model", "*.txt") for file in folder.glob(pattern)]
    return sorted({*weights, *texts} - {folder / "manifest.json"})


def _count_parameters(folder: Path, *, asked: str) -> int:
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{asked}/config.json: transformers makes no causal language model of it ({_first_line(error)}); "
            "give the folder of one"
        ) from error
    return sum(parameter.numel() for parameter in model.parameters())


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _fetch(source: HubModel, folder: Path) -> None:
    # Straight into its place: the hub client resumes a broken download by what it finds there.
    name = f"{source.repo} at {source.revision}"
    try:
        snapshot_download(
            source.repo,
            revision=source.revision,
            local_dir=folder,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"],
        )
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise UserError(
            f"{name}: not on the hub, or closed to you; check repo and revision, or set HF_TOKEN"
        ) from error
    except (HTTPError, OSError) as error:
        raise UserError(
            f"{name}: cannot be downloaded ({type(error).__name__}); run `prefetch` with a network, or use kind: local"
        ) from error
