"""What a checkpoint lacks, or has beside its architecture, is refused before weights are drawn at random."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from further import a_few
from harness.checking.tiny import FAMILIES, tiny_inputs
from harness.errors import UserError
from harness.inputs.make_models import make_model
from harness.inputs.models import check_savable, generation_why, load_model, load_tokenizer
from harness.inputs.tokens import check_ids
from harness.study.jobs import ModelJob
from harness.study.sources import LocalModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

Weights = dict[str, Tensor]


def prefixed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + key: value for key, value in weights.items()}


def inside(weights: Weights) -> Weights:
    """Compiled layer by layer, as is usual for large models."""
    return {key.replace(".0.", ".0._orig_mod."): value for key, value in weights.items()}


def without_first(weights: Weights) -> Weights:
    return dict(list(weights.items())[1:])


def with_more(weights: Weights) -> Weights:
    return weights | {"value_head.weight": torch.zeros(3)}


def first_shorter(weights: Weights) -> Weights:
    key = next(iter(weights))
    return weights | {key: weights[key][:-1].clone()}


REFUSED: list[tuple[Callable[[Weights], Weights], str]] = [
    (
        prefixed("_orig_mod."),
        r"lacks \d\d tensors.* first _orig_mod\.[^;]*; rename its keys without _orig_mod\., which",
    ),
    (prefixed("module."), r"rename its keys without module\., which DistributedDataParallel puts there$"),
    (prefixed("base_model.model."), r"rename its keys without base_model\.model\., which peft puts there$"),
    (prefixed("wrapped."), r"first wrapped\.[^;]*; rename its keys without the prefix wrapped\.$"),
    (inside, r"rename its keys without _orig_mod\., which torch\.compile puts there$"),
    (
        without_first,
        r"the checkpoint lacks (1 tensor|2 tensors) of the architecture, first [\w.]*; take the config\.json",
    ),
    (
        with_more,
        r"the checkpoint holds 1 tensor that the architecture has not, first value_head\.weight; take the",
    ),
    (first_shorter, r"first [\w.]*: \(\d+(, \d+)?\) in the checkpoint, \(\d+(, \d+)?\) in the architecture; take the"),
]


def model_with(folder: Path, family: str, change: Callable[[Weights], Weights], *, old: bool = False) -> Path:
    """A model whose weights were changed, as model.safetensors or as pytorch_model.bin."""
    model = tiny_inputs(folder, family).model
    file = model / "model.safetensors"
    weights = change(load_file(file))
    if old:
        file.unlink()
        torch.save(weights, model / "pytorch_model.bin")
    else:
        save_file(weights, file, metadata={"format": "pt"})
    return model


def prefetched(model: Path, folder: Path) -> Any:
    return make_model(ModelJob(label="m", source=LocalModel(kind="local", path=str(model))), folder)


@pytest.mark.parametrize("old", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sound_checkpoint_is_taken(tmp_path: Path, family: str, old: bool) -> None:
    model = model_with(tmp_path, family, dict, old=old)
    record = prefetched(model, tmp_path / "m")
    assert record.parameters == sum(p.numel() for p in load_model(model, weight_dtype="fp32").parameters())
    assert ("pytorch_model.bin" in record.files_sha256) == old


@pytest.mark.parametrize("old", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("family", a_few(FAMILIES, one_in=3))
@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_what_does_not_fit_is_refused_at_prefetch_and_at_loading(
    tmp_path: Path, family: str, change: Callable[[Weights], Weights], message: str, old: bool
) -> None:
    model = model_with(tmp_path, family, change, old=old)
    for act in (lambda: prefetched(model, tmp_path / "m"), lambda: load_model(model, weight_dtype="fp32")):
        with pytest.raises(UserError, match=message) as caught:
            act()
        assert str(caught.value).startswith(f"{model}: ")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("family", ["gemma", "gpt2"])
def test_a_head_that_config_ties_and_the_checkpoint_holds_apart_is_refused(tmp_path: Path, family: str) -> None:
    def untied(weights: Weights) -> Weights:
        embedding = next(value for key, value in weights.items() if "wte" in key or "embed_tokens" in key)
        return weights | {"lm_head.weight": embedding + 1}

    model = model_with(tmp_path / "apart", family, untied)
    with pytest.raises(UserError, match=r"config\.json says tie_word_embeddings, and the checkpoint holds a head that"):
        load_model(model, weight_dtype="fp32")
    same = model_with(tmp_path / "same", family, lambda weights: {
        **weights, "lm_head.weight": next(v for k, v in weights.items() if "wte" in k or "embed_tokens" in k).clone()
    })  # fmt: skip
    load_model(same, weight_dtype="fp32")


# ------------------------------------------------------------ what else is only noticed when it is late


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.9, "top_p": 0.6},  # as vicuna-7b-v1.5 has it: loads, and cannot be saved
        {"pad_token_id": -1},
        {"early_stopping": "maybe"},  # cannot be loaded either
        {"num_return_sequences": 2},
    ],
)
def test_a_generation_config_that_is_refused_is_replaced_by_a_neutral_one(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = tiny_inputs(tmp_path).model
    assert generation_why(model) is None
    (model / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert str(generation_why(model)).startswith("generation_config.json is refused by transformers, and replaced by")
    loaded: Any = load_model(model, weight_dtype="fp32")
    loaded.save_pretrained(tmp_path / "exported")
    exported = json.loads((tmp_path / "exported" / "generation_config.json").read_text(encoding="utf-8"))
    assert exported["eos_token_id"] == 2
    assert not set(settings) & set(exported) - {"pad_token_id"}


def test_what_cannot_be_exported_is_refused_before_it_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_inputs(tmp_path).model
    loaded, tokenizer = load_model(model, weight_dtype="fp32"), load_tokenizer(model)
    check_savable(loaded, tokenizer, path=model)

    def refuses(*_: Any, **__: Any) -> None:
        raise ValueError("no\nway")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", refuses)
    with pytest.raises(UserError, match=r"transformers cannot save this model again \(no\); correct its config.json"):
        check_savable(loaded, tokenizer, path=model)


def test_a_pad_token_outside_the_embedding_gives_way_to_one_inside(tmp_path: Path) -> None:
    model = tiny_inputs(tmp_path).model
    given = AutoTokenizer.from_pretrained(model)
    given.add_special_tokens({"pad_token": "[PAD]"})
    given.save_pretrained(model)
    rows = json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    assert given.pad_token_id == rows
    assert load_tokenizer(model).pad_token_id == given.unk_token_id < rows


def test_an_end_token_outside_the_embedding_is_refused_with_both_numbers(tmp_path: Path) -> None:
    model = tiny_inputs(tmp_path).model
    given = AutoTokenizer.from_pretrained(model)
    given.add_special_tokens({"eos_token": "<|im_end|>"})
    given.save_pretrained(model)
    with pytest.raises(
        UserError, match=r"the end token '<\|im_end\|>' has id (\d+), and the model's embedding has \1 rows"
    ):
        prefetched(model, tmp_path / "m")


def test_rows_with_a_token_outside_the_embedding_are_refused_with_both_numbers(tmp_path: Path) -> None:
    model = tiny_inputs(tmp_path).model
    tokenizer = load_tokenizer(model)
    tokenizer.add_tokens(["<|im_start|>"])
    embedding = torch.nn.Embedding(len(tokenizer) - 1, 4)
    check_ids([[1, len(tokenizer) - 2], []], tokenizer=tokenizer, embedding=embedding)
    with pytest.raises(UserError, match=rf"the token '<\|im_start\|>' has id {len(tokenizer) - 1}, and the model's"):
        check_ids([[1], [5, len(tokenizer) - 1]], tokenizer=tokenizer, embedding=embedding)


@pytest.mark.parametrize("kind", ["nonsuch", "vit"], ids=["unknown", "no language model"])
def test_an_unknown_architecture_is_refused(tmp_path: Path, kind: str) -> None:
    model = tiny_inputs(tmp_path).model
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"model_type": kind}), encoding="utf-8")
    with pytest.raises(UserError, match=r"transformers makes no causal language model of it \(.*; give the folder of"):
        prefetched(model, tmp_path / "m")


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    """config.json of a GPT-2, weights of a Llama: nothing meets."""
    model = tiny_inputs(tmp_path).model
    weights = load_file(model / "model.safetensors")
    GPT2LMHeadModel(GPT2Config(vocab_size=105, n_embd=32, n_layer=2, n_head=4)).save_pretrained(model)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"; take the config\.json that belongs to these weights"):
        prefetched(model, tmp_path / "m")
